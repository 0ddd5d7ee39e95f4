"""The denoising objective: the prediction target, and how much each part of it counts.

Shapes: B examples, C latent channels, H W latent size.
"""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


def sample_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps in 0 … total−1, (B,): uniform, one in each of `count` equal strata."""
    offsets = torch.rand(count, generator=generator) + torch.randperm(count, generator=generator)
    return (offsets / count * total).long().clamp(max=total - 1)


def sample_noise(shape: torch.Size, noise_offset: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise (B, C, H, W); `noise_offset` adds a constant per channel, to learn brightness."""
    noise = torch.randn(shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*shape[:2], 1, 1, generator=generator)
    return noise


def denoising_target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The prediction target: the noise, the velocity (Salimans & Ho 2022), or the latents themselves ("sample")."""
    prediction = scheduler.config["prediction_type"]
    if prediction == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    return latents if prediction == "sample" else noise


def denoising_loss(
    prediction: Tensor, target: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error over a batch, a scalar in float32.

    `weights` (B,) weigh examples; `mask` (B, 1, H, W) weighs positions and is normalised per example, so that a small
    subject counts as much as a large one.
    """
    error = (prediction.float() - target.float()).square()  # (B, C, H, W)
    if mask is not None:
        error = error * (mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6))
    per_example = error.mean(dim=(1, 2, 3))  # (B,)
    return (per_example if weights is None else per_example * weights).mean()


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR-γ weights (Hang et al. 2023, arXiv 2303.09556), (B,).

    min(SNR, γ) over SNR where noise is predicted, over SNR + 1 for velocities, over 1 for latents.
    """
    snr = compute_snr(scheduler, timesteps)
    divisors = {"v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisors.get(scheduler.config["prediction_type"], snr.clamp(min=1e-8))
