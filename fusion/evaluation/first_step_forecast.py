"""Predict from the first denoising step which adapters disturb each other, without drawing a picture.

    lost_ij = (a_j - f_ij) / (a_j - n_j)

a_j, f_ij, n_j: similarity to the references of concept j of the picture that the UNet predicts from pure noise, for a
prompt of j with j's adapter alone (a), with i's adapter added (f), and for j's plain noun with the base (n). This is
1 - retention, as in identity.py, at the first step, without guidance. On ungated adapters it predicted what pictures
lose, where measures of weights and inputs (cross_talk) did not (docs/fusion-bench.md).

Shapes: C concepts, S seeds.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fusion.adapters.adapter import Adapter, nouns
from fusion.composition.compatibility_report import Forecast
from fusion.evaluation.clip_judge import Judge, similarity
from fusion.evaluation.identity import MIN_EFFECT, SINGLE
from fusion.evaluation.output_error import concepts_of
from fusion.models.attachment import attach
from fusion.models.autoencoder import decode_latents
from fusion.models.denoising import encode_prompts, predict
from fusion.models.noise_schedule import forward_process
from fusion.models.pipeline import Pipeline, execution_device


def forecast(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    references: Mapping[str, Sequence[Image.Image]],
    judge: Judge,
    *,
    prompt: str = SINGLE,
    seeds: Sequence[int] = range(4),
    clip_skip: int = 0,
) -> Forecast:
    """What each concept with references will lose of its identity to each other one, with the gates of the files.

    `prompt` holds {first}. Takes C² + C steps of the UNet, of S pictures each. Raises whatever attach raises.
    """
    tokens = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    vectors = {token: judge.pictures(references[token]) for token in tokens if references.get(token)}

    def to_references(token: str, word: str, *active: str) -> float:
        """Similarity to the token's references of the picture predicted for `word` by the `active` concepts."""
        with ExitStack() as attached:
            for adapter in adapters:
                attached.enter_context(attach(pipe, _only(adapter, active)))
            pictures = first_step_pictures(pipe, prompt.format(first=word), seeds, clip_skip)
        return float(similarity(judge.pictures(pictures), [vectors[token]]).mean())

    lost: dict[tuple[str, str], float] = {}
    for token in vectors:
        alone = to_references(token, token, token)
        if (effect := alone - to_references(token, nouns(adapters)[token])) > MIN_EFFECT:
            others = [other for other in tokens if other != token]
            lost |= {(by, token): (alone - to_references(token, token, by, token)) / effect for by in others}
    return Forecast(tokens, [[lost.get((by, token)) for token in tokens] for by in tokens])


def _only(adapter: Adapter, tokens: Sequence[str]) -> Adapter:
    """The branches of these concepts; with none, only the embeddings remain."""
    names = {branch.name for token, one in concepts_of(adapter).items() if token in tokens for branch in one.branches}
    return replace(adapter, branches=tuple(branch for branch in adapter.branches if branch.name in names))


@torch.no_grad()
def first_step_pictures(pipe: Pipeline, prompt: str, seeds: Sequence[int], clip_skip: int = 0) -> list[Image.Image]:
    """The S pictures that the UNet's first step predicts from each seed's noise: blurred means of possible results."""
    schedule: Any = forward_process(pipe, clip_sample=False)
    first = schedule.config.num_train_timesteps - 1
    side = pipe.unet.config.sample_size
    shape = pipe.unet.config.in_channels, side, side
    noise: Tensor = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise = noise.to(execution_device(pipe, pipe.unet), pipe.unet.dtype)
    times = torch.full((len(noise),), first, device=noise.device)
    prediction = predict(pipe, noise, times, encode_prompts(pipe, [prompt] * len(noise), clip_skip))
    latents = schedule.step(prediction, first, noise).pred_original_sample
    return decode_latents(pipe, latents)
