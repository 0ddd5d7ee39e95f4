"""Pixels to latents and back, in float32 where an autoencoder overflows in half precision.

Shapes: B pictures, C latent channels, H W latent size, h w pixels.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn

from fusion.models.pipeline import Pipeline


@torch.no_grad()
def encode_pixels(pipe: Pipeline, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, h, w), -1 … 1, to latents (B, C, H, W) in float32, scaled as the UNet expects.

    The latents are the mode: the autoencoder's variance is far below the noise of training.
    """
    with _without_overflow(pipe):
        mode: Tensor = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    return mode.float() * pipe.vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe: Pipeline, latents: Tensor) -> list[Image.Image]:
    """The pictures of scaled latents (B, C, H, W)."""
    with _without_overflow(pipe):
        scaled = latents.to(pipe.vae.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor
        pixels = pipe.vae.decode(scaled).sample
    return pipe.image_processor.postprocess(pixels.float())


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
