"""Where in a picture the concepts of its prompt are going to stand, found by asking the UNet.

A picture is begun with every concept by its noun. A quarter of the way, when things have found their places, the UNet
predicts once more for every concept, its token in the place of its noun: where that changes the prediction, the
concept stands. These are the masks of DiffEdit (Couairon et al. 2022, arXiv 2210.11427), with tokens for edits.

Shapes: C concepts, H W latent size.
"""

import logging
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fusion.generation.config import Region
from fusion.models.denoising import encode_prompts, predict
from fusion.models.pipeline import Pipeline

logger = logging.getLogger(__name__)

LOOK = 0.25  # of the steps
FAINT = 0.2  # of a concept's largest change; where it changes less, the prompt of the picture rules


class Looked(Exception):
    """Raised in the middle of a drawing, with what the UNet is given there: the rest would be for nothing."""

    def __init__(self, latents: Tensor, timestep: Any) -> None:
        super().__init__()
        self.latents, self.timestep = latents, timestep  # (1, channels, H, W)


@contextmanager
def looking(unet: nn.Module, steps: int) -> Generator[None]:
    """Raise Looked from the UNet's call a quarter of the way through `steps`."""
    calls = 0

    def look(_unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls > LOOK * steps:
            raise Looked((kwargs["sample"] if "sample" in kwargs else args[0])[:1], args[1])

    hook = unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def by_nouns(prompt: str, nouns: Mapping[str, str], keep: Collection[str] = ()) -> str:
    """A prompt in which all concepts but those of the tokens `keep` are called by their nouns."""
    for token, noun in nouns.items():
        if token not in keep:
            prompt = prompt.replace(token, noun)
    return prompt


def changes(pipe: Pipeline, seen: Looked, prompt: str, nouns: Mapping[str, str]) -> Tensor:
    """(C, H, W): by how much each concept's token, in the place of its noun, changes the prediction; mean squares."""
    texts = [by_nouns(prompt, nouns), *(by_nouns(prompt, nouns, [token]) for token in nouns)]
    noisy = seen.latents.expand(len(texts), -1, -1, -1)
    times = torch.as_tensor(seen.timestep, device=noisy.device).expand(len(texts))
    with torch.no_grad():
        told = predict(pipe, noisy, times, encode_prompts(pipe, texts))
    return (told[1:] - told[:1]).float().square().mean(dim=1)


def places(maps: Tensor) -> Tensor:
    """(C, H, W) changes to (C, H, W) bool, no cell twice: smoothed, each against its own largest, the larger wins."""
    reach = min(maps.shape[-2:]) // 16
    smooth = F.avg_pool2d(maps[None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[0]
    shares = smooth / smooth.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    owner = F.one_hot(shares.argmax(dim=0), len(maps)).permute(2, 0, 1).bool()
    return owner & (shares > FAINT)


def regions_of(masks: Tensor, tokens: Mapping[str, str]) -> list[Region]:
    """A region for every concept that has cells; a warning for one that has none."""
    found: list[Region] = []
    for token, mask in zip(tokens, masks, strict=True):
        if mask.any():
            found.append(Region(token, mask=Image.fromarray((mask.cpu().numpy() * 255).astype("uint8"))))
        else:
            logger.warning("No place of its own was found for %s; it follows the prompt of the whole picture.", token)
    return found
