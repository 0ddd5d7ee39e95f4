"""Pixels to latents and back, in float32 where an autoencoder overflows in half precision.

Shapes: B pictures, C latent channels, H W latent size, h w pixels.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn

from fusion.models.pipeline import Pipeline, execution_device


@torch.no_grad()
def encode_pixels(pipe: Pipeline, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, h, w), -1 … 1, to latents (B, C, H, W) in float32, scaled as the UNet expects.

    The latents are the mode: the autoencoder's variance is far below the noise of training.
    """
    with _without_overflow(pipe):
        mode: Tensor = pipe.vae.encode(pixels.to(execution_device(pipe, pipe.vae), pipe.vae.dtype)).latent_dist.mode()
    mean, std = _statistics(pipe, mode.device)
    return (mode.float() - mean) / std * pipe.vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe: Pipeline, latents: Tensor) -> list[Image.Image]:
    """The pictures of scaled latents (B, C, H, W)."""
    device = execution_device(pipe, pipe.vae)
    with _without_overflow(pipe):
        mean, std = _statistics(pipe, device)
        scaled = latents.to(device).float() / pipe.vae.config.scaling_factor * std + mean
        pixels = pipe.vae.decode(scaled.to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(pixels.float())


def _statistics(pipe: Pipeline, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation (1, C, 1, 1) of an autoencoder's latents, where its config has them; else 0 and 1."""
    values = (pipe.vae.config.get("latents_mean"), pipe.vae.config.get("latents_std"))
    if any(value is None for value in values):
        return 0.0, 1.0
    mean, std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in values)
    return mean, std


@contextmanager
def _without_overflow(pipe: Pipeline) -> Generator[None]:
    """The autoencoder in float32 where its config says that float16 overflows, as diffusers' SDXL pipelines do."""
    vae = pipe.vae
    stored = vae.dtype
    upcast = stored == torch.float16 and vae.config.force_upcast
    if upcast:
        nn.Module.to(vae, torch.float32)  # ModelMixin.to warns of every cast
    try:
        yield
    finally:
        if upcast:
            nn.Module.to(vae, stored)
