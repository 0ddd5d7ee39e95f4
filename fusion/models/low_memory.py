"""Drawing with less of a GPU's memory: slower, and the VAE's tiles are blended where they meet."""

import torch

from fusion.models.pipeline import Pipeline

TILE = 512  # pixels of a side that the VAE encodes and decodes at a time


def enable_low_memory(pipe: Pipeline, device: torch.device) -> None:
    """Let a pipeline draw on `device` with only the model that computes there, and its VAE one tile at a time.

    On a GPU nothing can be trained on it then, and only one thread may draw with it.
    """
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = TILE, TILE // pipe.vae_scale_factor
    if device.type in ("cpu", "mps"):  # Apple's GPU has no memory of its own
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)
