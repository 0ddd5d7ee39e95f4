"""How much of each concept is left after fusion, measured on the UNet's prediction, without an image metric.

    output error = ‖ε_fused − ε_alone‖² / ‖ε_alone − ε_base‖²   on a concept's own prompts: 0 as if alone, 1 as much
                                                                disturbed as the concept itself changes
    drift        = ‖ε_fused − ε_base‖² / ‖ε_base‖²              on prompts without any concept

The noisy latents come from the picture the concept's adapter draws alone, so that they are ones the model meets.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fusion.adapters.adapter import Adapter, Branch
from fusion.errors import ConfigError
from fusion.generation.drawing import generate
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts, predict
from fusion.models.pipeline import Pipeline

PROMPTS = ("a {token}", "a {token} on a blue background", "a {token} on the left of a house")
CONCEPT_FREE = ("a dog on a blue background", "a red car on a white background", "a house beside a tree")
LEVELS = 6  # of noise, for every prompt


@dataclass(frozen=True)
class Survival:
    """Per concept, and for concept-free prompts, under one gating."""

    output_error: dict[str, float]  # token -> mean over prompts and noise levels
    drift: float


def measure_survival(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    gatings: Sequence[str | None],
    *,
    prompts: Sequence[str],
    concept_free: Sequence[str],
    seed: int,
) -> list[Survival]:
    """Attach all adapters at once and hold what the UNet says against each concept alone, and against the base.

    Each concept alone is taken as its file gates it; each of `gatings`, as in attach, applies to all together and
    gives one result. `prompts` hold "{token}". Raises ConfigError for a prompt without it.
    """
    if strange := [prompt for prompt in prompts if "{token}" not in prompt]:
        raise ConfigError(f"Prompt '{strange[0]}' has no {{token}} to put the concept in.")
    concepts = {
        token: concept_question(pipe, single, [prompt.replace("{token}", token) for prompt in prompts], seed)
        for adapter in adapters
        for token, single in concepts_of(adapter).items()
    }
    free = free_question(pipe, list(concept_free), seed)
    measured: list[Survival] = []
    for gating in gatings:
        with ExitStack() as attached:
            for adapter in adapters:
                attached.enter_context(attach(pipe, adapter, gating))
            errors = {token: scene.error(pipe) for token, scene in concepts.items()}
            measured.append(Survival(errors, free.error(pipe)))
    return measured


def concepts_of(adapter: Adapter) -> dict[str, Adapter]:
    """For each concept's token, the adapter that teaches it alone, at the strength it has here."""
    tokens = [concept.token for concept in adapter.info.concepts]

    def stands_for(branch: Branch) -> Sequence[str]:
        """An ungated branch may stand for the concept of its name, or for all."""
        return branch.gate or [token for token in tokens if token.strip("<>") == branch.name] or tokens

    return {t: replace(adapter, branches=tuple(b for b in adapter.branches if t in stands_for(b))) for t in tokens}


@dataclass(frozen=True)
class Question:
    """What the UNet is asked, and what it should answer."""

    prompts: list[str]
    noisy: Tensor  # (prompts · LEVELS, C, H, W)
    times: Tensor  # (prompts · LEVELS)
    expected: Tensor  # like noisy
    scale: Tensor  # mean square that counts as an error of 1

    def error(self, pipe: Pipeline) -> float:
        """How far the answer is off as `pipe` is now."""
        answer = _predictions(pipe, self.prompts, self.noisy, self.times)
        return float((answer - self.expected).square().mean() / self.scale) if self.scale > 0 else 0.0


def concept_question(pipe: Pipeline, single: Adapter, prompts: list[str], seed: int) -> Question:
    """What a concept's own adapter says on its prompts; an error of 1 is all that it changes of the base."""
    asked = prompts, *_noised(pipe, [single], prompts, seed)
    with attach(pipe, single):
        alone = _predictions(pipe, *asked)
    with attach(pipe, replace(single, branches=())):  # the base that knows the word, and nothing else
        base = _predictions(pipe, *asked)
    return Question(*asked, alone, (alone - base).square().mean())


def free_question(pipe: Pipeline, prompts: list[str], seed: int) -> Question:
    """What the base says on prompts without concepts; an error of 1 is all that it says."""
    asked = prompts, *_noised(pipe, [], prompts, seed)
    base = _predictions(pipe, *asked)
    return Question(*asked, base, base.square().mean())


def _noised(pipe: Pipeline, adapters: Sequence[Adapter], prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """Noisy latents (prompts · LEVELS, C, H, W) of drawn pictures, and their timesteps; always the same ones."""
    pictures = [generate(pipe, prompt, adapters=adapters, seed=seed)[0].image for prompt in prompts]
    schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(pictures).to(pipe.vae.device, pipe.vae.dtype)
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    clean = clean.repeat_interleave(LEVELS, dim=0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    total = schedule.config.num_train_timesteps
    times = torch.linspace(0.15 * total, 0.99 * total, LEVELS).long().repeat(len(prompts)).to(clean.device)
    return schedule.add_noise(clean, noise, times), times


def _predictions(pipe: Pipeline, prompts: list[str], noisy: Tensor, times: Tensor) -> Tensor:
    """The UNet's predictions for every prompt at every level, in float32."""
    made: list[Tensor] = []
    with torch.no_grad():
        for prompt, latents, steps in zip(prompts, noisy.split(LEVELS), times.split(LEVELS), strict=True):
            made.append(predict(pipe, latents, steps, encode_prompts(pipe, [prompt] * LEVELS)).float())
    return torch.cat(made)
