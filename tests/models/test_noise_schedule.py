"""Bases of another noise, of quantised weights or for inpainting are drawn where that is possible, else refused."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import fusion
import tiny
from fusion.errors import BaseMismatch, ConfigError
from fusion.generation.schedulers import make_scheduler
from fusion.models.denoising import encode_prompts, predict
from fusion.models.layer_sites import sites
from fusion.models.noise_schedule import forward_process
from fusion.training.loss import denoising_target, snr_weights
from trained import attached, draw, trained_adapter

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (diffusers.EDMDPMSolverMultistepScheduler(), "EDM noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow matching"),
        (diffusers.DPMSolverMultistepScheduler(**FLOW), "flow matching"),
    ],
)
def test_other_noise_is_drawn_by_its_own_scheduler_and_refused_elsewhere(scheduler, kind, tmp_path):
    pipe = tiny.pipeline("sdxl")
    rex = trained_adapter(pipe)
    pipe.scheduler = scheduler
    message = rf"^This base has {kind} \({type(scheduler).__name__}\), not Stable Diffusion's"
    if hasattr(scheduler, "init_noise_sigma"):
        with attached(pipe, rex):
            assert draw(pipe, "a <rex>").isfinite().all()
    else:
        with pytest.raises(BaseMismatch, match=message):
            fusion.generate(pipe, "a <rex>", [rex])
    for refused in (
        lambda: forward_process(pipe),
        lambda: make_scheduler(pipe.scheduler, "euler"),
        lambda: fusion.check_training(pipe, fusion.TrainingConfig(token="<tom>", instance_data_dir=tmp_path)),
        lambda: fusion.record_moments(pipe, [rex]),
    ):
        with pytest.raises(BaseMismatch, match=message):
            refused()


def test_a_base_that_predicts_the_sample_is_trained_towards_it():
    pipe = tiny.pipeline("sd1")
    schedule = forward_process(pipe, prediction_type="sample")
    latents, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    assert torch.equal(denoising_target(schedule, latents, noise, times), latents)
    noisy = schedule.add_noise(latents, noise, times)
    step = schedule.step(denoising_target(schedule, latents, noise, times)[1:], 900, noisy[1:])
    assert torch.allclose(step.pred_original_sample, latents[1:], atol=1e-5)
    ratio = schedule.alphas_cumprod[times] / (1 - schedule.alphas_cumprod[times])
    assert torch.allclose(snr_weights(schedule, times, 5.0), ratio.clamp(max=5.0))


def test_quantised_layers_are_named(tmp_path):
    pipe, message = tiny.pipeline("sd1"), r"'\w+' of this base is quantised \(Linear, {}\)"
    rex = trained_adapter(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(BaseMismatch, match=message.format("float8_e4m3fn")):
        fusion.attach(pipe, rex)
    pipe = tiny.pipeline("sd1")
    layer = sites(pipe)["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].module
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(BaseMismatch, match=message.format("uint8")):  # as bitsandbytes stores 4 bits
        fusion.attach(pipe, rex)


class EightBits(torch.Tensor):
    """A weight as torchao and quanto have it: a tensor that stands for others, in an ordinary or a derived layer."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["numbers", "scale"], {}

    def dequantize(self):
        return self.numbers.to(self.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, _types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        plain = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


class QuantisedLinear(torch.nn.Linear):
    """As quanto's QLinear while it is not frozen: the weight is rounded at every call, and inputs by a hook."""

    def forward(self, x):
        return torch.nn.functional.linear(x, EightBits.of(self.weight).dequantize(), self.bias)


def as_torchao(layer):
    layer.weight = torch.nn.Parameter(EightBits.of(layer.weight.detach()), requires_grad=False)


def as_quanto(layer):
    layer.__class__ = QuantisedLinear
    layer.register_forward_pre_hook(lambda _, args: tuple((x * 64).round() / 64 for x in args))


@pytest.mark.parametrize("quantise", [as_torchao, as_quanto])
def test_adapters_are_exact_on_quantised_layers_that_know_their_weight(quantise):
    pipe = tiny.pipeline("sdxl")
    for layer in (site.module for name, site in sites(pipe).items() if name.startswith("unet.")):
        if isinstance(layer, torch.nn.Linear):
            quantise(layer)
    rex, tom = trained_adapter(pipe), trained_adapter(pipe, "<tom>", k=1)
    base = draw(pipe, "a dog")
    with attached(pipe, rex):
        alone = draw(pipe, "a <rex>")
    with attached(pipe, tom, rex):
        assert torch.equal(draw(pipe, "a <rex>"), alone) and torch.equal(draw(pipe, "a dog"), base)
    assert torch.equal(draw(pipe, "a dog"), base) and not torch.equal(alone, base)
    if quantise is as_torchao:
        with pytest.raises(BaseMismatch, match="of this base is quantised; baked, it would have to be rounded again"):
            fusion.bake(pipe, rex, gating="none")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_folders_of_quantised_models_are_refused_in_one_line(component, tmp_path):
    tiny.pipeline("sd1").save_pretrained(tmp_path)
    path = tmp_path / component / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    with pytest.raises(BaseMismatch) as caught:
        fusion.open_pipeline(tmp_path, device="cpu")
    assert str(caught.value) == (
        f"'{tmp_path}' could not be opened as a Stable Diffusion base: its {component} is quantised (bitsandbytes), "
        "and adapters need the weights themselves; take it in float16 or bfloat16."
    )


def test_a_folder_in_float8_is_opened_as_the_numbers_it_holds(tmp_path):
    tiny.pipeline("sd1").save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}
    save_file(stored, path)
    pipe = fusion.open_pipeline(tmp_path, device="cpu")
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in pipe.unet.state_dict().items())
    with attached(pipe, trained_adapter(pipe)):
        assert draw(pipe, "a <rex>", num_inference_steps=1).isfinite().all()


def test_training_on_a_base_for_inpainting_is_refused_at_once(tmp_path):
    pipe = tiny.pipeline("sd1")
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    pipe.unet = type(pipe.unet).from_config({**config, "in_channels": 9})
    with pytest.raises(ConfigError, match="its UNet takes 9 channels"):
        fusion.check_training(pipe, fusion.TrainingConfig(token="<tom>", instance_data_dir=tmp_path))


def test_a_whole_lcm_model_is_given_the_guidance():
    pipe = tiny.pipeline("sd1")
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=16).eval()
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    pipe.register_modules(unet=unet, scheduler=diffusers.LCMScheduler.from_config(pipe.scheduler.config))
    inputs = []
    unet.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    config = fusion.GenerationConfig(prompt="a dog", num_inference_steps=1)
    fusion.generate(pipe, config)
    (noisy, time), options = inputs[0]
    with torch.no_grad():
        expected = unet(noisy, time, **options)[0]
        conditioning = encode_prompts(pipe, ["a dog"])
        assert torch.equal(predict(pipe, noisy, time[None].expand(len(noisy)), conditioning), expected)
    assert options["timestep_cond"] is not None


def test_the_forward_process_follows_settings_that_the_bases_scheduler_leaves_at_their_defaults():
    pipe = tiny.pipeline("sd1")
    pipe.scheduler = diffusers.DDIMScheduler()
    process = forward_process(pipe, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert process.config.prediction_type == "v_prediction" and float(process.alphas_cumprod[-1]) < 1e-4
    with pytest.raises(ConfigError, match="'pndm' cannot draw on this base, which predicts the sample"):
        make_scheduler(diffusers.DDPMScheduler(prediction_type="sample"), "pndm")
