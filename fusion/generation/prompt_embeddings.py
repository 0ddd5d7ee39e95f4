"""The prompts of a drawing as the arguments of a pipeline call: encoded here, in chunks and with weights.

Shapes: B pictures, R regions, n chunks, T text positions, D embedding width, P pooled width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.generation.config import GenerationConfig
from fusion.models.denoising import Conditioning, encode_prompts
from fusion.models.pipeline import Pipeline
from fusion.models.prompt_chunks import count_chunks

_NAMES = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


def pictures_by_chunks(pipe: Pipeline, config: GenerationConfig) -> list[list[int]]:
    """The numbers of the pictures whose prompts have as many chunks, n: those of one n are drawn in one batch.

    Padded to the longest prompt of all, a picture would depend on the others.
    """
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(config.picture_prompts()):
        groups.setdefault(_chunks(pipe, config, [prompt]), []).append(number)
    return list(groups.values())


@torch.no_grad()
def embed_prompts(pipe: Pipeline, config: GenerationConfig, numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The arguments for pictures `numbers` of a drawing, or all: states (B, (1 + R)·n·T, D), pooled (B, P), negatives.

    n is the number of chunks of the longest prompt, the negative one and those of regions among them.
    """
    assert config.regions != "auto"
    prompts = config.picture_prompts()
    texts = [prompts[number] for number in (range(len(prompts)) if numbers is None else numbers)]
    batch = len(texts)
    if config.regions:
        texts = [texts[0], *(region.prompt for region in config.regions)]
    chunks = _chunks(pipe, config, texts)
    encoded = [_encode(pipe, texts, config, chunks)]
    if config.guidance_scale > 1:
        encoded.append(_negative(pipe, texts, config, chunks, encoded[0]))
    if config.regions:
        encoded = [_of_one_picture(one, batch) for one in encoded]
    tensors = [tensor for one in encoded for tensor in one]
    return {name: tensor for name, tensor in zip(_NAMES, tensors, strict=False) if tensor is not None}


def _chunks(pipe: Pipeline, config: GenerationConfig, texts: Sequence[str]) -> int:
    return count_chunks(pipe, [*texts, config.negative_prompt], config.prompt_weighting)


def _encode(pipe: Pipeline, texts: Sequence[str], config: GenerationConfig, chunks: int) -> Conditioning:
    return encode_prompts(pipe, texts, config.clip_skip, weighting=config.prompt_weighting, chunks=chunks)


def _negative(
    pipe: Pipeline, texts: Sequence[str], config: GenerationConfig, chunks: int, positive: Conditioning
) -> Conditioning:
    """The negative prompt for each text, at the same clip_skip, as A1111 and ComfyUI have it.

    An empty one is zeros where the base's config asks for it, as SDXL's does.
    """
    if not config.negative_prompt and pipe.config.get("force_zeros_for_empty_prompt"):
        pooled = None if positive.pooled is None else torch.zeros_like(positive.pooled)
        return Conditioning(torch.zeros_like(positive.states), pooled)
    return _encode(pipe, [config.negative_prompt] * len(texts), config, chunks)


def _of_one_picture(encoded: Conditioning, batch: int) -> Conditioning:
    """The prompt of a picture and those of its regions, one after the other, for all pictures."""
    pooled = None if encoded.pooled is None else encoded.pooled[:1].expand(batch, -1)
    return Conditioning(encoded.states.flatten(0, 1)[None].expand(batch, -1, -1), pooled)
