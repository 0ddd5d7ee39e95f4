"""An autoencoder that overflows in half precision encodes and decodes in float32, wherever latents are shown."""

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from fusion.evaluation.first_step_forecast import first_step_pictures
from fusion.generation.pipeline_call import preview
from fusion.models.autoencoder import decode_latents, encode_pixels


@pytest.fixture
def overflowing():
    """A pipeline whose autoencoder has activations beyond 65,504, in float16."""
    pipe = tiny.pipeline("sd1")
    for layer in (pipe.vae.decoder.conv_in, pipe.vae.encoder.conv_in):
        assert isinstance(layer, nn.Conv2d)
        layer.weight.data *= 1e5
    for weight in pipe.vae.parameters():
        weight.data = weight.data.half().float()  # as its float16 twin has them
    return pipe


def test_previews_and_forecasts_are_those_of_float32(overflowing):
    pipe, latents = overflowing, torch.randn(2, 4, 8, 8)
    latents /= latents[:1].std()
    expected = [np.asarray(image) for image in decode_latents(pipe, latents)]
    encoded, forecast = encode_pixels(pipe, latents[:, :3]), first_step_pictures(pipe, "a dog", [0])
    pipe.vae.to(torch.float16)
    weights = list(pipe.vae.parameters())
    assert np.array_equal(np.asarray(preview(pipe, latents)), expected[0])
    assert np.array_equal(np.asarray(decode_latents(pipe, latents)[1]), expected[1])
    assert np.array_equal(np.asarray(first_step_pictures(pipe, "a dog", [0])[0]), np.asarray(forecast[0]))
    assert torch.equal(encode_pixels(pipe, latents[:, :3]), encoded)
    assert all(
        one is two and two.dtype == torch.float16 for one, two in zip(weights, pipe.vae.parameters(), strict=True)
    )
    assert expected[0].std() > 1  # not blank
    pipe.vae.register_to_config(force_upcast=False)
    with pytest.warns(RuntimeWarning, match="invalid value"):  # NaN, as it overflows
        preview(pipe, latents)


def test_latents_have_the_mean_and_deviation_of_the_config_as_diffusers_decodes_them():
    pipe = tiny.pipeline("sdxl")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.vae.register_to_config(latents_mean=[0.5, 0.1, -0.3, 0.2], latents_std=[2.0, 3.0, 4.0, 5.0])
    timesteps = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": latents, "prompt": "a dog"}
    drawn = pipe(**timesteps, output_type="latent").images, pipe(**timesteps).images[0]
    assert np.array_equal(np.asarray(decode_latents(pipe, drawn[0])[0]), np.asarray(drawn[1]))
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    vae, scale = pipe.vae, pipe.vae.config.scaling_factor
    mode = vae.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(encode_pixels(pipe, pixels), (mode - mean) / std * scale)
