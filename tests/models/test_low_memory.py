"""Drawing with little memory: the VAE's tiles, where models are, and what adapters do meanwhile."""

import numpy as np
import pytest
import torch

import fusion
import tiny
from fusion.errors import ConfigError
from fusion.models import low_memory
from fusion.models.low_memory import enable_low_memory
from trained import trained_adapter

CPU = torch.device("cpu")


def test_pictures_are_decoded_in_tiles_and_adapters_stay_exact(monkeypatch):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe)
    config = fusion.GenerationConfig(prompt="a dog", num_inference_steps=2, height=32, width=32)
    (whole,) = fusion.generate(pipe, config)
    monkeypatch.setattr(low_memory, "TILE", 16)
    enable_low_memory(pipe, CPU)
    sides, decoder = list[int](), pipe.vae.decoder.forward
    pipe.vae.decoder.forward = lambda z, *rest: (sides.append(max(z.shape[-2:])), decoder(z, *rest))[1]
    (tiled,) = fusion.generate(pipe, config)
    assert len(sides) > 1 and max(sides) * pipe.vae_scale_factor <= 16
    difference = np.abs(np.asarray(whole.image, int) - np.asarray(tiled.image, int))
    assert 0 < difference.mean() < 8  # of 255: tiles know nothing beyond their edges
    (gated,) = fusion.generate(pipe, config, [adapter])
    assert gated.image.tobytes() == tiled.image.tobytes()


def test_on_a_gpu_models_are_moved_and_nothing_is_trained(monkeypatch, tmp_path):
    pipe, devices, offload = tiny.pipeline("sdxl"), [], type(tiny.pipeline("sdxl")).enable_model_cpu_offload
    monkeypatch.setattr(
        type(pipe), "enable_model_cpu_offload", lambda self, device: (devices.append(device), offload(self, device=CPU))
    )
    enable_low_memory(pipe, torch.device("cuda", 1))
    assert devices == [torch.device("cuda", 1)] and hasattr(pipe.unet, "_hf_hook")
    for model in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        model._hf_hook.execution_device = torch.device("meta")  # stands for the GPU
    config = fusion.TrainingConfig(token="<rex>", instance_data_dir=tmp_path, instance_prompt="a {token}")
    with pytest.raises(ConfigError, match=r"Training needs every model to stay on its device.*offloading"):
        next(fusion.train(pipe, config))
