"""Adapters are exact in every pipeline of diffusers that has these UNets, as in the plain one."""

import inspect

import diffusers
import pytest
import torch
from PIL import Image

import fusion
import tiny
from fusion.errors import ConfigError
from fusion.evaluation import first_step_forecast
from fusion.models import input_moments
from fusion.models.autoencoder import decode_latents
from fusion.models.denoising import encode_prompts
from fusion.models.gates import TokenRows
from fusion.models.layer_sites import sites
from fusion.models.pipeline import execution_device
from fusion.models.targets import resolve
from trained import attached, trained_adapter

PICTURE, MASK = Image.new("RGB", (16, 16), (200, 50, 50)), Image.new("L", (16, 16), 255)
START = {"image": PICTURE, "strength": 0.9}
CONTROL = {"image": torch.linspace(0, 1, 768).reshape(1, 3, 16, 16), "width": 16, "height": 16}
INPAINTING = {**START, "mask_image": MASK, "width": 16, "height": 16}
FAMILIES = ["sd1", pytest.param("sdxl", marks=pytest.mark.long)]
CASES = ("img2img", "inpainting", "9 channels", "controlnet", "t2i-adapter", "ip-adapter", "pag", "from_pipe")
OPTIMIZED = {  # ways to draw that change the UNet's layers or their order
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "slices and tiles": lambda pipe: (pipe.vae.enable_slicing(), pipe.vae.enable_tiling()),
    "group offload": lambda pipe: pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
}


def of_class(name, family, pipe, **parts):
    """The pipeline class of a family with the components of another pipeline."""
    kind = getattr(diffusers, f"StableDiffusion{'XL' if family == 'sdxl' else ''}{name}Pipeline")
    known = inspect.signature(kind.__init__).parameters
    options = {} if family == "sdxl" else {"requires_safety_checker": False}
    call = kind(**{key: value for key, value in pipe.components.items() if key in known}, **parts, **options)
    call.set_progress_bar_config(disable=True)
    return call


def for_inpainting(family):
    pipe = tiny.pipeline(family)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    pipe.unet = diffusers.UNet2DConditionModel.from_config({**config, "in_channels": 9}).eval()
    return of_class("Inpaint", family, pipe)


def with_ip_adapter(pipe):
    width, weights = pipe.unet.config.cross_attention_dim, {}
    for number, name in enumerate(n for n in pipe.unet.attn_processors if "attn2" in n):
        rows = pipe.unet.get_submodule(name.rpartition(".")[0]).to_q.out_features
        weights |= {f"{2 * number + 1}.to_{part}_ip.weight": torch.randn(rows, width) * 0.1 for part in "kv"}
    image = {"proj.weight": torch.randn(4 * width, 16) * 0.1, "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}], low_cpu_mem_usage=False)
    return pipe


def pipeline(case, family):
    """The pipeline, and what its call takes beside a prompt."""
    torch.manual_seed(0)
    pipe = for_inpainting(family) if case == "9 channels" else tiny.pipeline(family)
    if case in OPTIMIZED:
        OPTIMIZED[case](pipe)
        return pipe, {}
    auto = diffusers.AutoPipelineForImage2Image.from_pipe
    if case == "controlnet":
        net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.1)
        return of_class("ControlNet", family, pipe, controlnet=net.eval()), CONTROL
    if case == "t2i-adapter":
        sizes = {"channels": [32, 64], "downscale_factor": 2, "adapter_type": "full_adapter"}
        if family == "sdxl":
            sizes = {"channels": [32, 64, 64, 64], "downscale_factor": 4, "adapter_type": "full_adapter_xl"}
        return of_class(
            "Adapter", family, pipe, adapter=diffusers.T2IAdapter(in_channels=3, num_res_blocks=1, **sizes).eval()
        ), CONTROL
    return {
        "img2img": lambda: (of_class("Img2Img", family, pipe), START),
        "inpainting": lambda: (diffusers.AutoPipelineForInpainting.from_pipe(pipe), INPAINTING),
        "9 channels": lambda: (pipe, INPAINTING),
        "ip-adapter": lambda: (with_ip_adapter(pipe), {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}),
        "pag": lambda: (diffusers.AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True), {"pag_scale": 3.0}),
        "from_pipe": lambda: (auto(pipe), START),
    }[case]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", [*CASES, *OPTIMIZED])
def test_exact_in_every_pipeline(case, family):
    pipe, options = pipeline(case, family)
    one, other = trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)
    pipe.set_progress_bar_config(disable=True)

    def latents(prompt):
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(prompt, generator=generator, **settings, **options).images

    base = latents("a dog")
    with attached(pipe, one):
        alone = latents("a <rex>")
    with attached(pipe, other, one):
        assert torch.equal(latents("a <rex>"), alone)
        assert torch.equal(latents("a dog"), base)
    assert torch.equal(latents("a dog"), base) and not torch.equal(alone, base)
    if case == "ip-adapter":
        assert not [name for name in sites(pipe) if "processor" in name or "encoder_hid_proj" in name]
        assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in resolve(["unet.attn2"], sites(pipe)))
    if case in ("controlnet", "t2i-adapter", "ip-adapter"):
        with pytest.raises(ConfigError, match=r"attach\(\), and call"):
            fusion.generate(pipe, "a <rex>", [one])


PARTS = {
    "controlnet": (r"no picture for the controlnet", None),  # the UNet alone can be trained and measured
    "t2i-adapter": (r"StableDiffusionAdapterPipeline reads only the first vector of a concept\. Use a Stable",) * 2,
    "ip-adapter": (r"An IP-Adapter is loaded, .* need a pipeline without \(unload_ip_adapter\)",) * 2,
}


@pytest.mark.parametrize("case", PARTS)
def test_what_cannot_learn_beside_parts_with_a_picture_of_their_own_is_refused_before_the_work(case, tmp_path):
    pipe, _ = pipeline(case, "sd1")
    PICTURE.resize((32, 32)).save(tmp_path / "0.png")
    settings = {"token": "<new>", "noun": "dog", "instance_data_dir": tmp_path, "output_dir": tmp_path, "rank": 4}
    config, rex = fusion.TrainingConfig(**settings, resolution=32, max_train_steps=1), trained_adapter(pipe)
    previews, message = PARTS[case]
    with pytest.raises(ConfigError, match=previews):
        fusion.check_training(pipe, config.updated({"validation_prompt": "a {token}"}))
    if message is None:
        assert [step.loss > 0 for step in fusion.train(pipe, config)] == [True]
        assert fusion.fuse([rex, trained_adapter(pipe, "<tom>", k=1)], method="regression", pipe=pipe).branches
        return
    for refused in (lambda: fusion.check_training(pipe, config), lambda: fusion.record_moments(pipe, [rex])):
        with pytest.raises(ConfigError, match=message):
            refused()
    if case == "t2i-adapter":
        for refused in (
            lambda: fusion.attach(pipe, trained_adapter(pipe, "<two>", vectors=2)),
            lambda: next(fusion.distill(pipe, [rex], fusion.DistillationConfig())),
        ):
            with pytest.raises(ConfigError, match=message):
                refused()


@pytest.mark.parametrize("case", ["attention slicing", "model offload", "slices and tiles"])
def test_pipelines_that_save_memory_draw_regions_and_previews(case):
    pipe, config = tiny.pipeline("sd1"), fusion.GenerationConfig(prompt="a <rex> and a <tom>", num_inference_steps=4)
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    config = config.updated(
        {"regions": [fusion.Region("<rex>", (0, 0, 0.5, 1)), fusion.Region("<tom>", (0.5, 0, 1, 1))]}
    )
    (expected,) = fusion.generate(pipe, config, adapters)
    OPTIMIZED[case](pipe)
    before, previews = dict(pipe.unet.attn_processors), []
    (picture,) = fusion.generate(pipe, config, adapters, on_step=lambda _step, _all, draw: previews.append(draw()))
    assert difference(picture.image, expected.image) <= 1 and len(previews) == 4
    assert fusion.generate(pipe, config.updated({"regions": "auto"}), adapters)
    assert pipe.unet.attn_processors == before


def offloaded(family):
    """A pipeline under CPU offloading; "meta" stands for a GPU: it takes no products with tensors of the CPU."""
    pipe = tiny.pipeline(family)
    pipe.enable_model_cpu_offload(device="cpu")
    for model in pipe.components.values():
        if hasattr(model, "_hf_hook"):
            model._hf_hook.execution_device = torch.device("meta")
    return pipe


def test_offloaded_models_are_given_inputs_where_they_compute():
    pipe = offloaded("sd1")
    assert execution_device(pipe, pipe.vae).type == execution_device(pipe, pipe.unet).type == "meta"
    assert encode_prompts(pipe, ["a dog"]).states.is_meta
    pipe = offloaded("sdxl")
    latents = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z: (latents.append(z), decode(z))[1]
    with pytest.raises(NotImplementedError, match="meta"):  # no pixels to show
        decode_latents(pipe, torch.randn(1, 4, 8, 8))
    assert latents[0].is_meta
    rows = TokenRows({"<rex>": torch.tensor([1])}, 4)
    assert rows.matching(("<rex>",), torch.randn(4, 2)).device.type == "cpu"
    assert rows.matching(("<rex>",), torch.randn(4, 2, device="meta")).is_meta


@pytest.mark.parametrize("module", [input_moments, first_step_forecast])
def test_what_is_measured_on_offloaded_models_lies_where_they_compute(module, monkeypatch):
    inputs = []
    monkeypatch.setattr(module, "encode_prompts", lambda *_: None)
    monkeypatch.setattr(module, "predict", lambda _, noisy, *rest: (inputs.append(noisy), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        if module is input_moments:
            fusion.record_moments(pipe := offloaded("sd1"), [trained_adapter(pipe)])
        else:
            first_step_forecast.first_step_pictures(offloaded("sd1"), "a dog", [0])
    assert inputs[0].is_meta


def test_what_learns_is_refused_on_models_that_move_while_they_compute(tmp_path):
    pipe = offloaded("sd1")
    settings = fusion.TrainingConfig(token="<tom>", instance_data_dir=tmp_path)
    with pytest.raises(
        ConfigError, match=r"^Training needs every model to stay on its device, .* open the base without"
    ):
        fusion.check_training(pipe, settings)
    with pytest.raises(ConfigError, match=r"^A distillation needs every model to stay"):
        next(fusion.distill(pipe, [trained_adapter(tiny.pipeline("sd1"))], fusion.DistillationConfig()))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_draws_in_a_mask(family, tmp_path):
    plain, special = tiny.pipeline(family), for_inpainting(family)
    config = fusion.GenerationConfig(prompt="a <rex>", num_inference_steps=2, image_strength=1, num_images=2)
    left = Image.new("L", (16, 16), 0)
    left.paste(255, (0, 0, 8, 16))
    for pipe in (plain, special):
        rex = trained_adapter(pipe, "<rex>")
        first, second = fusion.generate(pipe, config, [rex], image=PICTURE, mask=left)
        again, _ = fusion.generate(pipe, config, [rex], image=PICTURE, mask=left)
        base, _ = fusion.generate(pipe, config.updated({"prompt": "a dog"}), image=PICTURE, mask=left)
        assert first.image.tobytes() == again.image.tobytes() != base.image.tobytes()
        alone = config.updated({"seed": 1, "num_images": 1})
        (single,) = fusion.generate(pipe, alone, [rex], image=PICTURE, mask=left)
        assert difference(single.image, second.image) <= 1
        assert first.recipe.mask and fusion.Recipe.from_json(first.recipe.to_json()) == first.recipe
    regions = [fusion.Region("a dog", (0, 0, 0.5, 1))]
    (picture,) = fusion.generate(
        special, config.updated({"regions": regions, "num_images": 1}), [rex], image=PICTURE, mask=left
    )
    assert difference(picture.image, first.image) > 0
    for refused, options in ((plain, {"mask": left}), (special, {}), (special, {"image": PICTURE})):
        with pytest.raises(ConfigError, match="--image"):
            fusion.generate(refused, config, **options)
    auto = config.updated({"prompt": "a <rex> and a <tom>", "regions": "auto"})
    with pytest.raises(ConfigError, match="for inpainting, its UNet takes 9 channels"):
        fusion.generate(special, auto, [rex, trained_adapter(special, "<tom>", k=1)], image=PICTURE, mask=left)


def difference(one, other):
    pixels = [torch.tensor(list(image.tobytes()), dtype=torch.int) for image in (one, other)]
    return int((pixels[0] - pixels[1]).abs().max())
