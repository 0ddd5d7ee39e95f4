"""Adapter files that other programs write: the ΔW we read is the writer's own.

PEFT, diffusers and LyCORIS (where it is installed) write their files here. For other programs there are small files in
their layout of keys, as their savers write it: OneTrainer's StableDiffusion(XL)LoRASaver, ComfyUI's LoraSave with the
key map of comfy/lora.py, diffusers 0.14's save_attn_procs.
"""

import copy
import json
from functools import partial

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fusion
import tiny
from fusion.adapters.adapter import float32
from fusion.cli import main
from fusion.errors import BaseMismatch, FormatError
from fusion.layer_names import kernel_of
from fusion.models.layer_sites import all_sites, matrix, sites
from trained import draw

CONVOLUTION = "down_blocks.0.resnets.0.conv1"
LAYERS = ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k", CONVOLUTION, "down_blocks.0.attentions.0.proj_in"]
KINDS = {
    "lora": partial(peft.LoraConfig, lora_alpha=2),
    "rslora": partial(peft.LoraConfig, lora_alpha=2, use_rslora=True),
    "dora": partial(peft.LoraConfig, lora_alpha=2, use_dora=True),
    "loha": partial(peft.LoHaConfig, alpha=2),
    "loha, kernels": partial(peft.LoHaConfig, alpha=2, use_effective_conv2d=True),
    "lokr": partial(peft.LoKrConfig, alpha=2),
    "lokr, kernels": partial(peft.LoKrConfig, alpha=2, use_effective_conv2d=True, decompose_both=True),
    "lokr, full": partial(peft.LoKrConfig, alpha=2, rank_pattern={}, decompose_factor=2),
}


def in_double(pipe, adapter):
    """ΔW of every layer in float64, without the rounding of float32."""
    table, changes = all_sites(pipe), {}
    for branch in adapter.branches:
        for name, layer in branch.layers.items():
            exact = copy.deepcopy(float32(layer)).double().on(matrix(table[name]).double())
            changes[name] = exact.delta().dense().detach()
    return changes


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, change in theirs.items():
        assert float((ours[name] - change.flatten(1)).norm()) <= 1e-6 * float(change.norm()) > 0, name


def peft_model(config, model):
    """A model with an adapter by PEFT, every tensor off its start, in float64; and ΔW by PEFT's own merging."""
    before = {name: module.weight.detach().double() for name, module in model.named_modules() if name in LAYERS}
    wrapped = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1 * (1 + parameter.abs().mean()))
                parameter.copy_(parameter.float())  # what the file can hold
    state = get_peft_model_state_dict(wrapped)
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    merged = wrapped.merge_and_unload()
    return state, {f"unet.{name}": merged.get_submodule(name).weight.detach() - w for name, w in before.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_files(kind, tmp_path):
    rank = 16 if kind == "lokr, full" else 3
    config = KINDS[kind](r=rank, target_modules=LAYERS)
    pipe = tiny.pipeline("sd1")
    state, theirs = peft_model(config, tiny.pipeline("sd1").unet)
    save_file(state, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        fusion.load(tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    adapter = fusion.load(tmp_path / "adapter_model.safetensors")
    assert adapter.info.name == tmp_path.name and (kind not in ("lora", "dora") or adapter.info.base.family == "sd1")
    assert_same(in_double(pipe, adapter), theirs)
    if kind == "dora":
        with pytest.raises(BaseMismatch, match=r"is a DoRA.*--base"):
            adapter.deltas()
    else:
        assert_same({n: delta.dense().double() for n, delta in adapter.deltas().items()}, theirs)
    before = draw(pipe)
    with fusion.attach(pipe, adapter):  # whole and in parts: the same picture
        attached = draw(pipe)
    assert not torch.allclose(attached, before, atol=1e-4) and torch.equal(draw(pipe), before)
    for name, change in theirs.items():
        all_sites(pipe)[name].module.weight.data += change.float()
    torch.testing.assert_close(attached, draw(pipe), rtol=1e-4, atol=1e-4)


def test_what_asks_for_the_change_of_a_dora_needs_its_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.pipeline("sd1")
    pipe.save_pretrained("base")
    O, I = matrix(sites(pipe)[f"unet.{LAYERS[0]}"]).shape  # noqa: E741
    stem = f"unet.{LAYERS[0]}"
    tensors = {f"{stem}.lora_A.weight": torch.randn(2, I), f"{stem}.lora_B.weight": torch.randn(O, 2)}
    save_file(tensors | {f"{stem}.lora_magnitude_vector": torch.rand(O)}, "dora.safetensors")
    fuse = [
        "fuse",
        "dora.safetensors",
        "dora.safetensors",
        "--method",
        "average",
        "--rank",
        "2",
        "-o",
        "out.safetensors",
    ]
    export = ["export", "dora.safetensors", "--to", "diffusers", "-o", "plain.safetensors"]
    for command in (["inspect", "dora.safetensors"], fuse, export):
        assert main(command) == 1
        assert "'dora' is a DoRA" in capsys.readouterr().err
        assert main([*command, "--base", "base", "--device", "cpu"]) == 0
    exact = fusion.with_base_weights(pipe, fusion.load("dora.safetensors")).deltas()
    torch.testing.assert_close(
        fusion.load("plain.safetensors").deltas()[stem].dense(), exact[stem].dense(), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_own_files(kind, tmp_path):
    config = KINDS[kind](r=3, target_modules=LAYERS)
    state, theirs = peft_model(config, tiny.pipeline("sd1").unet)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    state, metadata = convert_state_dict_to_diffusers(state), {"r": 3, "lora_alpha": 2, "use_dora": kind == "dora"}
    StableDiffusionPipeline.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=metadata)
    adapter = fusion.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert_same(in_double(tiny.pipeline("sd1"), adapter), theirs)


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
@pytest.mark.parametrize(
    "options", [{}, {"use_tucker": True}, {"dora_wd": True}, {"use_tucker": True, "dora_wd": True, "wd_on_out": False}]
)
def test_files_of_lycoris_and_back(algorithm, options, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="LyCORIS is not installed (pip install lycoris-lora)")
    lycoris.LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    pipe = tiny.pipeline("sd1")
    names = {f"lycoris_{name}".replace(".", "_"): name for name, _ in pipe.unet.named_modules()}
    net = lycoris.create_lycoris(
        pipe.unet, 1.0, linear_dim=3, linear_alpha=2.0, conv_dim=3, conv_alpha=2.0, algo=algorithm, **options
    )
    theirs = {}
    with torch.no_grad():
        for module in net.loras:
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            name = names[module.lora_name]
            weight = pipe.unet.get_submodule(name).weight.double()
            module.double()
            change = module.get_weight(weight.shape) if hasattr(module, "get_weight") else module.make_weight()
            change = change * module.scalar * (module.scale if algorithm == "locon" else 1)
            if module.wd:
                change = module.apply_weight_decompose(weight + change, 1) - weight
            theirs[f"unet.{name}"] = change
    assert theirs.keys() > {f"unet.{name}" for name in LAYERS}
    net.apply_to()  # only then the layers are in its state dict
    net.float()
    net.save_weights(str(tmp_path / "net.safetensors"), torch.float32, {})
    adapter = fusion.load(tmp_path / "net.safetensors")
    assert_same(in_double(tiny.pipeline("sd1"), adapter), theirs)
    fusion.save(adapter, tmp_path / "ours.safetensors", "float32")
    assert fusion.load(tmp_path / "ours.safetensors").digest() == adapter.digest()
    report = fusion.export(adapter, tmp_path / "back.safetensors", "kohya", dtype="float32")
    written, back = (load_file(tmp_path / f"{name}.safetensors") for name in ("net", "back"))
    as_kohya = {key.replace("lycoris_", "lora_unet_"): tensor for key, tensor in written.items()}
    if "dora_wd" in options or algorithm != "locon":  # a plain LoRA is written with one alpha for all layers
        assert back.keys() == as_kohya.keys() and "written as what they were imported as" in " ".join(report.notes)
        for key, tensor in as_kohya.items():
            if not key.endswith("alpha"):  # of a LoKr of two full factors, it does nothing
                assert torch.equal(back[key], tensor), key
    again = fusion.load(tmp_path / "back.safetensors")
    assert_same(in_double(tiny.pipeline("sd1"), again), theirs)


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYOUTS = {
    "diffusers 0.14": {
        f"{ATTENTION}.processor.to_out_lora.%s.weight": f"unet.{ATTENTION}.to_out.0",
        f"unet.{ATTENTION}.processor.to_q_lora.%s.weight": f"unet.{ATTENTION}.to_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.%s.weight": (
            "text_encoder.encoder.layers.0.self_attn.out_proj"
        ),
    },
    "ComfyUI": {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_%s.weight": f"unet.{ATTENTION}.to_q",
        "diffusion_model.input_blocks.3.0.op.lora_%s.weight": "unet.down_blocks.0.downsamplers.0.conv",
        "diffusion_model.input_blocks.1.0.in_layers.2.lora_%s.weight": f"unet.{CONVOLUTION}",
        "diffusion_model.input_blocks.0.0.lora_%s.weight": "unet.conv_in",
        "diffusion_model.out.2.lora_%s.weight": "unet.conv_out",
        "diffusion_model.output_blocks.2.1.conv.lora_%s.weight": "unet.up_blocks.0.upsamplers.0.conv",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_%s.weight": (
            "text_encoder.encoder.layers.0.mlp.fc1"
        ),
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_%s.weight": (
            "text_encoder_2.encoder.layers.0.mlp.fc1"
        ),
    },
    "LyCORIS": {
        "lycoris_down_blocks_0_downsamplers_0_conv.lora_%s.weight": "unet.down_blocks.0.downsamplers.0.conv",
        "lycoris_encoder_layers_0_mlp_fc1.lora_%s.weight": "text_encoder.encoder.layers.0.mlp.fc1",
    },
    "sd-scripts, SDXL": {
        "lora_unet_input_blocks_1_0_in_layers_2.lora_%s.weight": f"unet.{CONVOLUTION}",
        "lora_unet_output_blocks_2_2_conv.lora_%s.weight": "unet.up_blocks.0.upsamplers.0.conv",
        "lora_unet_input_blocks_3_0_op.lora_%s.weight": "unet.down_blocks.0.downsamplers.0.conv",
    },
}


@pytest.mark.parametrize("writer", LAYOUTS)
def test_keys_of_other_writers(writer, tmp_path):
    tensors, expected = {}, {}
    for key, layer in LAYOUTS[writer].items():
        kernel, ones = kernel_of(layer, None), (1, 1) if kernel_of(layer, None) else ()
        down, up = torch.randn(2, 6, *kernel), torch.randn(5, 2, *ones)
        tensors |= {key % "down": down, key % "up": up}
        expected[layer] = up.flatten(1) @ down.flatten(1) * (0.5 if "lora_%s" in key else 1)
        if "lora_%s" in key:
            tensors[key.replace("lora_%s.weight", "alpha")] = torch.tensor(1)  # an integer, as svd_merge_lora writes
    save_file(tensors, tmp_path / "rex.safetensors")
    adapter = fusion.load(tmp_path / "rex.safetensors")
    assert_same({n: delta.dense() for n, delta in adapter.deltas().items()}, expected)
    if "ComfyUI" in writer:
        assert adapter.info.base.family == "sdxl"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_onetrainers_bundles_have_their_word(family, tmp_path):
    pipe = tiny.pipeline(family)
    layer = next(name for name in sites(pipe) if name.endswith("attn2.to_k"))
    (O, I), stem = matrix(sites(pipe)[layer]).shape, layer.replace("unet.", "lora_unet_", 1).replace(".", "_")  # noqa: E741
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    rows = {c: torch.randn(2, getattr(pipe, c).config.hidden_size) for c in keys if getattr(pipe, c, None) is not None}
    tensors = {f"{stem}.lora_down.weight": torch.randn(2, I), f"{stem}.lora_up.weight": torch.randn(O, 2)}
    bundle = {f"bundle_emb.My Rex.{keys[c]}": row for c, row in rows.items()}
    save_file(tensors | bundle, tmp_path / "lora.safetensors")
    adapter = fusion.load(tmp_path / "lora.safetensors")
    assert adapter.info.concepts == (fusion.Concept("<my-rex>", vectors=2),)
    assert all(torch.equal(adapter.tokens["<my-rex>"][c], row) for c, row in rows.items())
    with fusion.attach(pipe, adapter, "tokens"):
        assert not torch.equal(draw(pipe, "a <my-rex>"), draw(pipe, "a dog"))
    save_file(tensors | bundle | {"bundle_emb.My Rex.clip_l_out": torch.zeros(2, 4)}, tmp_path / "out.safetensors")
    with pytest.raises(FormatError, match="clip_l_out"):
        fusion.load(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("width", "metadata", "family"),
    [
        (768, {}, "sd1"),
        (1024, {"ss_base_model_version": "sd_v1"}, "sd2"),
        (2048, {}, "sdxl"),
        (6, {"ss_base_model_version": "sdxl_1.0"}, "sdxl"),
        (6, {"ss_base_model_version": "sd_1.5"}, "sd1"),
        (6, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        (6, {"modelspec.architecture": "stable-diffusion-v2/lora"}, "sd2"),
        (6, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        (6, {}, None),
    ],
)
def test_the_family_is_told_by_the_contents_and_export_follows_it(width, metadata, family, tmp_path):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"unet.{path}.lora_A.weight": torch.randn(2, width), f"unet.{path}.lora_B.weight": torch.randn(5, 2)}
    tensors |= {f"unet.time_embedding.linear_1.lora_{x}.weight": torch.randn(2, 2) for x in "AB"}
    save_file(tensors, tmp_path / "rex.safetensors", metadata)
    adapter = fusion.load(tmp_path / "rex.safetensors")
    assert (adapter.info.base and adapter.info.base.family) == family
    report = fusion.export(adapter, tmp_path / "out.safetensors", "kohya")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.alpha" in file.keys()) == (family == "sdxl")  # noqa: SIM118
    assert any("skips the layers time_embed" in note for note in report.notes) == (family == "sdxl")


def test_the_metadata_of_diffusers_name_the_alphas_of_components(tmp_path):
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"unet.{path}.lokr_w1": torch.randn(2, 2), f"unet.{path}.lokr_w2": torch.randn(3, 3)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.alpha": 2})}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    (delta,) = fusion.load(tmp_path / "a.safetensors").deltas().values()
    w1, w2 = tensors.values()
    torch.testing.assert_close(delta.dense(), torch.kron(w1, w2) / 2)
