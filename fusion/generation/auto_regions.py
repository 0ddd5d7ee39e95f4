"""Where in a picture the concepts of its prompt will be, found by asking the UNet.

A picture is begun with every concept by its noun. A quarter of the way, when the layout is settled, the UNet predicts
once more for every concept, its token in the position of its noun: where that changes the prediction, the concept will
be. These are the masks of DiffEdit (Couairon et al. 2022, arXiv 2210.11427), with tokens for edits.

Shapes: C concepts, H W latent size.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fusion.config import TOKEN
from fusion.generation.concept_cells import LAYOUT_SHARE, MIN_STEPS, by_nouns, cells_by_concept
from fusion.generation.config import GenerationConfig, Region
from fusion.generation.pipeline_call import call_pipeline
from fusion.models.denoising import encode_prompts, predict
from fusion.models.pipeline import Pipeline

logger = logging.getLogger(__name__)


class Midway(NamedTuple):
    """What the UNet is given in the middle of a drawing."""

    latents: Tensor  # (1, channels, H, W), scaled as the scheduler wants
    timestep: Tensor


def find_regions(
    pipe: Pipeline,
    config: GenerationConfig,
    image: Image.Image | None,
    nouns: Mapping[str, str],
    mask: Image.Image | None = None,
) -> tuple[Region, ...]:
    """A region for each concept of the prompt of one picture; none where there is a single concept."""
    if len(nouns) < 2:
        return ()
    (prompt,) = config.prompts
    plain = {"prompt": by_nouns(prompt, nouns), "num_images": 1, "regions": ()}
    midway = draw_midway(pipe, config.updated(plain), image, mask)
    maps = changes(pipe, midway, config, nouns)
    regions = regions_of(cells_by_concept(maps), nouns)
    return tuple(with_prompt(region, prompt, nouns) for region in regions)


def draw_midway(
    pipe: Pipeline, config: GenerationConfig, image: Image.Image | None = None, mask: Image.Image | None = None
) -> Midway:
    """Draw a quarter of the way, or as far as there is another step to come, and stop."""
    fewest = MIN_STEPS if image is None else math.ceil(MIN_STEPS / config.image_strength)
    config = config.updated({"num_inference_steps": max(config.num_inference_steps, fewest)})
    midway = list[Midway]()

    def stop(call: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        done, total = step + 1, call.num_timesteps
        if done == min(int(LAYOUT_SHARE * config.num_inference_steps), total - 1):
            timestep = call.scheduler.timesteps[done - total]
            midway.append(Midway(call.scheduler.scale_model_input(tensors["latents"], timestep), timestep))
            call._interrupt = True
        return tensors

    call_pipeline(pipe, config, image, {"callback_on_step_end": stop, "output_type": "latent"}, mask=mask)
    return midway[0]


def with_prompt(region: Region, prompt: str, nouns: Mapping[str, str]) -> Region:
    """A region of bare tokens with the prompt of the picture, in which no other concept is named.

    A concept is drawn worse when another concept's token stands before its own in the prompt.
    """
    words = region.prompt.split()
    if not all(TOKEN.fullmatch(word) and word in prompt for word in words):
        return region
    return replace(region, prompt=by_nouns(prompt, nouns, keep=words))


def changes(pipe: Pipeline, midway: Midway, config: GenerationConfig, nouns: Mapping[str, str]) -> Tensor:
    """(C, H, W): mean squares of how much each concept's token, in place of its noun, changes the prediction."""
    (prompt,), weighting = config.prompts, config.prompt_weighting
    texts = [by_nouns(prompt, nouns), *(by_nouns(prompt, nouns, [token]) for token in nouns)]
    noisy = midway.latents.expand(len(texts), -1, -1, -1)
    times = torch.as_tensor(midway.timestep, device=noisy.device).expand(len(texts))
    with torch.no_grad():
        encoded = encode_prompts(pipe, texts, config.clip_skip, weighting=weighting)
        predictions = predict(pipe, noisy, times, encoded)
    return (predictions[1:] - predictions[:1]).float().square().mean(dim=1)


def regions_of(masks: Tensor, tokens: Mapping[str, str]) -> list[Region]:
    """A region for every concept that has cells; a warning for one that has none."""
    regions: list[Region] = []
    for token, mask in zip(tokens, masks, strict=True):
        if mask.any():
            regions.append(Region(token, mask=Image.fromarray((mask.cpu().numpy() * 255).astype("uint8"))))
        else:
            logger.warning("No region was found for %s; it follows the prompt of the whole picture.", token)
    return regions
