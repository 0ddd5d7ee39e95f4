"""Encoded prompts and the UNet's prediction, alike for all families, by the pipeline's own prompt encoding.

Shapes: B prompts, T text positions, D embedding width, P pooled width, C H W latent size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusion.errors import ConfigError
from fusion.models.pipeline import Pipeline, execution_device
from fusion.models.prompt_chunks import EMPTY, Chunk, apply_weights, split_prompt
from fusion.models.prompt_layout import PromptBatch, encode_ids, token_ids
from fusion.models.tokens import text_encoders
from fusion.prompt_syntax import PromptPart, PromptWeighting

LCM_GUIDANCE = 7.5  # guidance_scale of drawings, if not set
TimeIds = tuple[int, ...]  # SDXL: original height, width, crop top, left, target height, width


class Conditioning(NamedTuple):
    states: Tensor  # (B, T, D)
    pooled: Tensor | None  # (B, P) for SDXL

    @classmethod
    def join(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Several batches as one."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


def is_inpainting(pipe: Pipeline) -> bool:
    """Whether the UNet is given a mask and the latents that it hides, beside those it denoises (9 channels)."""
    return pipe.unet.config.in_channels > pipe.unet.config.out_channels


def has_ip_adapter(pipe: Pipeline) -> bool:
    return getattr(pipe.unet, "encoder_hid_proj", None) is not None


def check_denoises(pipe: Pipeline) -> None:
    """Raise ConfigError for a base whose UNet needs more than noisy latents and a prompt."""
    if is_inpainting(pipe):
        raise ConfigError(
            f"This base is for inpainting, its UNet takes {pipe.unet.config.in_channels} channels: adapters can be "
            "attached and drawn with a mask, but training, regions = 'auto' and measuring need an ordinary base."
        )
    if has_ip_adapter(pipe):
        raise ConfigError(
            "An IP-Adapter is loaded, whose picture the UNet needs: adapters can be attached and the pipeline called "
            "with one, but training, regions = 'auto' and measuring need a pipeline without (unload_ip_adapter)."
        )


def encode_prompts(
    pipe: Pipeline,
    prompts: Sequence[str],
    clip_skip: int | None = None,
    *,
    weighting: PromptWeighting = "none",
    chunks: int | None = None,
) -> Conditioning:
    """Encode prompts of any length, with gradients where encoders or token rows ask for them.

    A prompt that is longer than the text encoders read is encoded in chunks of T positions (`split_prompt`), so that
    `states` are (B, n·T, D); the shorter ones are padded with empty chunks to n, the longest's number, or to `chunks`,
    where what is behind is cut off. `pooled` is of the first chunk. `weighting` says how weights of words are written.

    `clip_skip` leaves out that many layers at the end of the text encoders, as in diffusers: 1 is "Clip skip: 2" of
    A1111 and kohya; XL's are counted from the layer before the last, which it always takes. Raises ConfigError where
    the text encoders have not as many.
    """
    if chunks == 1 and weighting == "none":
        split = [[Chunk((PromptPart(prompt),))] for prompt in prompts]  # the tokenizer cuts it off
    else:
        split = [split_prompt(pipe, prompt, weighting) for prompt in prompts]
    number = chunks or max(map(len, split))
    padded = [chunk for one in split for chunk in [*one, *[EMPTY] * number][:number]]

    device = execution_device(pipe, pipe.unet)

    def encode(texts: Sequence[str]) -> Conditioning:
        return _encode_chunks(pipe, texts, clip_skip, device)

    states, pooled = encode([chunk.text for chunk in padded])
    states = apply_weights(pipe, padded, states, weighting, lambda: encode([""]).states)
    return Conditioning(states.unflatten(0, (-1, number)).flatten(1, 2), None if pooled is None else pooled[::number])


def encode_batch(pipe: Pipeline, prompts: PromptBatch, clip_skip: int | None = None) -> Conditioning:
    """As `encode_prompts`, of prompts that lie on the device: nothing waits for it."""
    states, pooled = encode_ids(pipe, prompts.ids, clip_skip)
    count = prompts.count
    return Conditioning(
        states.unflatten(0, (count, -1)).flatten(1, 2), None if pooled is None else pooled[:: len(pooled) // count]
    )


def _encode_chunks(pipe: Pipeline, texts: Sequence[str], clip_skip: int | None, device: torch.device) -> Conditioning:
    """Texts of one chunk each, (chunks, T, D)."""
    if clip_skip:
        check_clip_skip(pipe, clip_skip)
        if not hasattr(pipe, "text_encoder_2"):
            ids = {component: token_ids(pipe, component, texts).to(device) for component in text_encoders(pipe)}
            return Conditioning(*encode_ids(pipe, ids, clip_skip))
    encoded = pipe.encode_prompt(
        list(texts),
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip or None,
    )
    return Conditioning(encoded[0], encoded[2] if len(encoded) > 2 else None)


def check_clip_skip(pipe: Pipeline, clip_skip: int) -> None:
    """Raise ConfigError where a text encoder has no layer that `clip_skip` leaves over."""
    layers = min(len(_layers(encoder)) for encoder in text_encoders(pipe).values())
    most = layers - hasattr(pipe, "text_encoder_2")
    if not 0 <= clip_skip <= most:
        raise ConfigError(f"clip_skip is 0 to {most} on this base, whose text encoder has {layers} layers.")


def _layers(encoder: nn.Module) -> nn.ModuleList:
    return next(m for name, m in encoder.named_modules() if name.endswith("encoder.layers"))  # pyright: ignore


def predict(
    pipe: Pipeline,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Sequence[TimeIds] | Tensor | None = None,
    guidance: float = LCM_GUIDANCE,
) -> Tensor:
    """The UNet's prediction (B, C, H, W) for noisy latents at `timesteps` (B,).

    `time_ids` matter to SDXL only; without them the pictures are whole ones, of the latents' own size. `guidance` is
    an input of whole LCM UNets only. Raises ConfigError for a base that needs a mask or another picture, too.
    """
    check_denoises(pipe)
    scale = None
    if (width := pipe.unet.config.get("time_cond_proj_dim")) is not None:
        scales = torch.full((len(noisy),), guidance - 1)  # as diffusers' pipelines have it
        scale = pipe.get_guidance_scale_embedding(scales, embedding_dim=width).to(noisy.device, pipe.unet.dtype)
    added = None
    if conditioning.pooled is not None:
        height, width = (side * pipe.vae_scale_factor for side in noisy.shape[-2:])
        whole = (height, width, 0, 0, height, width)
        ids = [whole] * len(noisy) if time_ids is None else time_ids
        sizes = torch.as_tensor(ids, device=noisy.device, dtype=conditioning.pooled.dtype)
        added = {"text_embeds": conditioning.pooled, "time_ids": sizes}
    return pipe.unet(
        noisy.to(pipe.unet.dtype),
        timesteps,
        timestep_cond=scale,
        encoder_hidden_states=conditioning.states,
        added_cond_kwargs=added,
    ).sample
