"""Graphs as people have them: what else they put on MODEL and CONDITIONING, and how ComfyUI loads the weights."""

from dataclasses import replace

import pytest
import torch
from comfy_checks import check, encode, error, loaded

import fusion
from fusion.models.adapted_layers import base_of
from trained import everywhere, trained_adapter

pytestmark = pytest.mark.filterwarnings("default")
TEXTS = ("a <rex> in the snow", "a cat")


@pytest.fixture
def graph(comfyui, spectral, folders, toys):
    """A toy with <rex>: the toy, its MODEL, and the two conditionings of TEXTS."""

    def of(family="sd1"):
        toy = toys(family)
        rex = trained_adapter(toy.pipe, "<rex>", scale=0.2)
        model, clip = loaded(spectral, folders, toy, rex)
        return toy, rex, model, [encode(comfyui, clip, text) for text in TEXTS]

    return of


def compare(toy, rex, conds, calls):
    check(toy, conds, [[text] for text in TEXTS], calls, (rex,))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_other_sizes_and_crops(comfyui, graph, family):
    """A second sampler, and crops as detailers and tiled upscalers make them: of latent, area and mask."""
    toy, rex, model, conds = graph(family)
    for size in (8, 12, (6, 10)):
        compare(toy, rex, conds, toy.draw(model, *conds, size=size)[1])
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    area = comfyui.ConditioningSetArea().append(conds[1], 32, 64, 32, 0, 1.0)[0]
    regions = [*comfyui.ConditioningSetMask().append(conds[0], left, "default", 1.0)[0], *area]
    crops = []
    for tensor, options in regions:  # the right upper quarter, drawn at twice its size
        cropped = dict(options)
        if "mask" in options:
            cropped["mask"] = options["mask"][:, :32, 16:48]
        if "area" in options:
            cropped["area"] = (8, 4, 0, 4)
        crops.append([tensor, cropped])
    compare(toy, rex, conds, toy.draw(model, crops, conds[1])[1])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_controlnet(comfyui, graph, family):
    import comfy.cldm.cldm
    import comfy.controlnet

    toy, rex, model, conds = graph(family)
    config = toy.model.model.model_config.unet_config
    names = ("out_channels", "transformer_depth_output", "use_temporal_resblock", "use_temporal_attention")
    config = {name: value for name, value in config.items() if name not in names}
    torch.manual_seed(0)
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    apply = comfyui.ControlNetApplyAdvanced().apply_controlnet
    controlled = apply(*conds, control, torch.rand(1, 64, 64, 3), 0.8, 0.0, 1.0)
    latent, calls = toy.draw(model, *controlled)
    assert all(control is not None and control["middle"][0].any() for *_, control, _out in calls)
    compare(toy, rex, conds, calls)
    assert error(latent, toy.draw(model, *conds)[0]) > 1e-3


class Attention:
    """diffusers' attention with what a patch of ComfyUI's does to keys and values."""

    def __init__(self, patched):
        self.patched = patched

    def __call__(self, attn, hidden, encoder_hidden_states, **_):
        query = attn.to_q(hidden)
        return attn.to_out[0](self.patched(attn, query, encoder_hidden_states))


def heads(query, key, value, number):
    parts = (part.unflatten(-1, (number, -1)).transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def test_patches_of_cross_attention(comfyui, graph):
    """As IP-Adapters replace attention, or put rows behind the prompt, and as hypernetworks change it."""
    toy, rex, model, conds = graph()
    picture = {width: torch.randn(1, 4, width) for width in (64, 128)}  # keys and values of a picture
    rows = torch.randn(1, 4, 64)

    def replace_(model):
        def patch(q, k, v, options):
            n = options["n_heads"]
            image = picture[q.shape[-1]].expand(len(q), -1, -1)
            return heads(q, k, v, n) + 0.5 * heads(q, image, image, n)

        for block, number in (("input", 1), ("middle", 0), ("output", 2), ("output", 3)):
            model.set_model_attn2_replace(patch, block, number)

    def replaced(attn, q, context):
        image = picture[q.shape[-1]].expand(len(q), -1, -1)
        text = heads(q, attn.to_k(context), attn.to_v(context), attn.heads)
        return text + 0.5 * heads(q, image, image, attn.heads)

    def behind(model):
        def patch(n, context, value, options):
            both = torch.cat([context, rows.expand(len(context), -1, -1)], dim=1)
            return n, both, both

        model.set_model_attn2_patch(patch)

    def lengthened(attn, q, context):
        more = rows.expand(len(q), -1, -1)
        key, value = (torch.cat([m(context), base_of(m)(more)], dim=1) for m in (attn.to_k, attn.to_v))
        return heads(q, key, value, attn.heads)

    def scale(model):
        model.set_model_attn2_patch(lambda n, context, value, options: (n, context * 1.1, value * 0.9))

    def scaled(attn, q, context):
        return heads(q, attn.to_k(context * 1.1), attn.to_v(context * 0.9), attn.heads)

    processors = dict(toy.pipe.unet.attn_processors)
    for put, patched in ((replace_, replaced), (behind, lengthened), (scale, scaled)):
        changed = model.clone()
        put(changed)
        calls = toy.draw(changed, *conds)[1]
        ours = {name: Attention(patched) if "attn2" in name else own for name, own in processors.items()}
        toy.pipe.unet.set_attn_processor(ours)
        try:
            compare(toy, rex, conds, calls)
        finally:
            toy.pipe.unet.set_attn_processor(dict(processors))

    def before(n, context, value, options):
        both = torch.cat([rows.expand(len(context), -1, -1), context], dim=1)
        return n, both, both

    changed = model.clone()
    changed.set_model_attn2_patch(before)
    with pytest.raises(Exception, match="not behind them, so the positions of <rex> are not known"):
        toy.draw(changed, *conds)
    toy.draw(changed, conds[1], conds[1])


def test_tiled_attention(comfyui, spectral, folders, toys):
    """HyperTile cuts pictures into batches of tiles: layers given the prompt go on, gated layers without it refuse."""
    from comfy_extras.nodes_hypertile import HyperTile

    toy = toys("sd1")
    for targets in (None, everywhere(toy.pipe)):
        model, clip = loaded(spectral, folders, toy, trained_adapter(toy.pipe, "<rex>", targets=targets, scale=0.1))
        tiled = HyperTile.execute(model, 32, 1, 0, False)[0]
        conds = [encode(comfyui, clip, text) for text in TEXTS]
        if targets is None:
            assert toy.draw(tiled, *conds)[0].isfinite().all()
        else:
            with pytest.raises(Exception, match="such as HyperTile"):
                toy.draw(tiled, *conds)


def test_weights_cast_at_every_call(comfyui, spectral, graph, folders, monkeypatch):
    """--lowvram and --novram: layers keep the base's weights, and a LoRA is added to them while they run."""
    import comfy.model_management as memory
    import folder_paths

    toy, rex, model, _ = graph()
    lora = trained_adapter(toy.pipe, "<style>", kind="lora", k=1, gated=False, scale=0.1)
    fusion.export(lora, folders / "style.safetensors", "kohya", dtype="float32")
    folder_paths.folder_names_and_paths["loras"] = ([str(folders)], {".safetensors"})
    load = spectral["LoadSpectralAdapter"]().load
    monkeypatch.setattr(memory, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(memory, "vram_state", memory.VRAMState.NO_VRAM)
    weak = replace(lora, branches=tuple(replace(b, strength=0.8) for b in lora.branches))
    for before in (True, False):
        memory.unload_all_models()
        model, clip = toy.model, toy.clip
        if before:
            model, clip = comfyui.LoraLoader().load_lora(model, clip, "style.safetensors", 0.8, 0.8)
        model, clip = load(model, clip, "rex.safetensors", 1.0, 1.0)
        if not before:
            model, clip = comfyui.LoraLoader().load_lora(model, clip, "style.safetensors", 0.8, 0.8)
        conds = [encode(comfyui, clip, text) for text in TEXTS]
        first, calls = toy.draw(model, *conds)
        assert model.model.model_lowvram and model.model.lowvram_patch_counter
        check(toy, conds, [[text] for text in TEXTS], calls, (rex, weak))
        for m in (model, clip.patcher):
            m.partially_unload(torch.device("cpu"), 1)
        assert torch.equal(toy.draw(model, *conds)[0], first)
    memory.unload_all_models()
