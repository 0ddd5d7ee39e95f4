"""The prompts of a drawing as the arguments of a pipeline call: encoded here, in chunks and with weights.

Shapes: B pictures, R regions, n chunks, T text positions, D embedding width, P pooled width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion.generation.config import GenerationConfig
from fusion.models.denoising import Conditioning, encode_prompts
from fusion.models.pipeline import Pipeline
from fusion.models.prompt_chunks import count_chunks

_NAMES = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


@torch.no_grad()
def embed_prompts(pipe: Pipeline, config: GenerationConfig) -> dict[str, Tensor]:
    """The arguments for all pictures of a drawing: states (B, (1 + R)·n·T, D), pooled (B, P), and the negative's.

    n is the number of chunks of the longest prompt, the negative one and those of regions among them.
    """
    assert config.regions != "auto"
    texts = [config.prompt] * config.num_images
    if config.regions:
        texts = [config.prompt, *(region.prompt for region in config.regions)]
    chunks = count_chunks(pipe, [*texts, config.negative_prompt], config.prompt_weighting)
    encoded = [_encode(pipe, texts, config, chunks)]
    if config.guidance_scale > 1:
        encoded.append(_negative(pipe, texts, config, chunks, encoded[0]))
    if config.regions:
        encoded = [_of_one_picture(one, config.num_images) for one in encoded]
    tensors = [tensor for one in encoded for tensor in one]
    return {name: tensor for name, tensor in zip(_NAMES, tensors, strict=False) if tensor is not None}


def _encode(pipe: Pipeline, texts: Sequence[str], config: GenerationConfig, chunks: int) -> Conditioning:
    device: Any = getattr(pipe, "_execution_device", pipe.unet.device)  # under offloading, where the UNet will be
    weighting = config.prompt_weighting
    return encode_prompts(pipe, texts, config.clip_skip, weighting=weighting, chunks=chunks, device=device)


def _negative(
    pipe: Pipeline, texts: Sequence[str], config: GenerationConfig, chunks: int, positive: Conditioning
) -> Conditioning:
    """The negative prompt for each text, at the same clip_skip, as A1111 and ComfyUI have it.

    An empty one is zeros where the base's config asks for it, as SDXL's does.
    """
    if not config.negative_prompt and pipe.config.get("force_zeros_for_empty_prompt"):
        return Conditioning(*(None if tensor is None else torch.zeros_like(tensor) for tensor in positive))
    return _encode(pipe, [config.negative_prompt] * len(texts), config, chunks)


def _of_one_picture(encoded: Conditioning, batch: int) -> Conditioning:
    """The prompt of a picture and those of its regions, one after the other, for all pictures."""
    pooled = None if encoded.pooled is None else encoded.pooled[:1].expand(batch, -1)
    return Conditioning(encoded.states.flatten(0, 1)[None].expand(batch, -1, -1), pooled)
