"""Encoded prompts and the UNet's prediction, alike for all families, by the pipeline's own prompt encoding.

Shapes: B prompts, T text positions, D embedding width, P pooled width, C H W latent size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion.models.pipeline import Pipeline

TimeIds = tuple[int, ...]  # SDXL: original height, width, crop top, left, target height, width


class Conditioning(NamedTuple):
    states: Tensor  # (B, T, D)
    pooled: Tensor | None  # (B, P) for SDXL

    @classmethod
    def join(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Several batches as one."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


def encode_prompts(pipe: Pipeline, prompts: Sequence[str], clip_skip: int | None = None) -> Conditioning:
    """Encode prompts, with gradients where encoders or token rows ask for them; `clip_skip` as in diffusers."""
    encoded = pipe.encode_prompt(
        list(prompts),
        device=pipe.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )
    return Conditioning(encoded[0], encoded[2] if len(encoded) > 2 else None)


def predict(
    pipe: Pipeline,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Sequence[TimeIds] | None = None,
) -> Tensor:
    """The UNet's prediction (B, C, H, W) for noisy latents at `timesteps` (B,).

    `time_ids` matter to SDXL only; without them the pictures are whole ones, of the latents' own size.
    """
    added = None
    if conditioning.pooled is not None:
        height, width = (side * pipe.vae_scale_factor for side in noisy.shape[-2:])
        whole = (height, width, 0, 0, height, width)
        sizes = torch.tensor(
            list(time_ids or [whole] * len(noisy)), device=noisy.device, dtype=conditioning.pooled.dtype
        )
        added = {"text_embeds": conditioning.pooled, "time_ids": sizes}
    return pipe.unet(
        noisy.to(pipe.unet.dtype),
        timesteps,
        encoder_hidden_states=conditioning.states,
        added_cond_kwargs=added,
    ).sample
