"""Who will spoil whom, seen in one step: the picture that the UNet expects of pure noise is judged, and none is drawn.

    lost_ij = (a_j - f_ij) / (a_j - n_j)

with likeness to the references of concept j of what is expected of a prompt of j by j's adapter alone (a), with i's
added (f), and of its plain noun by the base (n): retention, as in identity.py, at the first of all steps. Without
guidance, which drowns the differences. Where weights and inputs did not (cross_talk), this did predict what pictures
of ungated adapters lose (docs/fusion-bench.md).

Shapes: C concepts, S seeds.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from fusion.adapters.adapter import Adapter, nouns
from fusion.composition.compatibility_report import Foresight
from fusion.evaluation.clip_judge import Judge, likeness
from fusion.evaluation.identity import SINGLE
from fusion.evaluation.output_error import concepts_of
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts, predict
from fusion.models.pipeline import Pipeline

UNSEEN = 0.02  # likeness that a concept must add to its noun for what it loses to mean anything


def foresee(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    references: Mapping[str, Sequence[Image.Image]],
    judge: Judge,
    *,
    prompt: str = SINGLE,
    seeds: Sequence[int] = range(4),
) -> Foresight:
    """What each concept with references will lose of its identity to each other one, added as the files gate it.

    `prompt` holds {first}. Takes C² + C steps of the UNet, of S pictures each. Raises whatever attach raises.
    """
    tokens = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    own = {token: judge.pictures(references[token]) for token in tokens if references.get(token)}

    def seen(token: str, word: str, *acting: str) -> float:
        """Likeness to the token's references of what is expected of that word, with those concepts' branches alone."""
        with ExitStack() as attached:
            for adapter in adapters:
                attached.enter_context(attach(pipe, _only(adapter, acting)))
            pictures = expected(pipe, prompt.format(first=word), seeds)
        return float(likeness(judge.pictures(pictures), [own[token]]).mean())

    lost: dict[tuple[str, str], float] = {}
    for into in own:
        alone = seen(into, into, into)
        if (gap := alone - seen(into, nouns(adapters)[into])) > UNSEEN:
            lost |= {(by, into): (alone - seen(into, into, by, into)) / gap for by in tokens if by != into}
    return Foresight(tokens, [[lost.get((by, into)) for into in tokens] for by in tokens])


def _only(adapter: Adapter, tokens: Sequence[str]) -> Adapter:
    """The branches that teach these concepts; none of them leaves the words alone."""
    kept = {branch.name for token, one in concepts_of(adapter).items() if token in tokens for branch in one.branches}
    return replace(adapter, branches=tuple(branch for branch in adapter.branches if branch.name in kept))


@torch.no_grad()
def expected(pipe: Pipeline, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
    """The pictures (S) that the UNet's first step expects of each seed's noise: blurred means of what may come."""
    schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    first = schedule.config.num_train_timesteps - 1
    side = pipe.unet.config.sample_size
    shape = pipe.unet.config.in_channels, side, side
    noise: Tensor = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise = noise.to(pipe.unet.device, pipe.unet.dtype)
    times = torch.full((len(noise),), first, device=noise.device)
    said = predict(pipe, noise, times, encode_prompts(pipe, [prompt] * len(noise)))
    clean = schedule.step(said, first, noise).pred_original_sample
    made = pipe.vae.decode(clean.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(made)
