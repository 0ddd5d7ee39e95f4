"""Bases of another noise, of quantised weights or for inpainting are drawn where that is possible, else refused."""

import diffusers
import pytest
import torch

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
