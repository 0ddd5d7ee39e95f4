"""How much of each concept remains after fusion, measured on the UNet's predictions: no image metric is needed.

    output error = ‖ε_fused − ε_alone‖² / ‖ε_alone − ε_base‖²   on a concept's own prompts: 0 as if alone, 1 changed as
                                                                much as the concept itself changes the base
    drift        = ‖ε_fused − ε_base‖² / ‖ε_base‖²              on prompts without any concept

The noisy latents are made from pictures that the concept's adapter draws alone, so that they are typical inputs.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, Branch
from fusion.composition.fusing import fuse
from fusion.errors import ConfigError, TokenConflict
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.models.attachment import attach
from fusion.models.autoencoder import encode_pixels
from fusion.models.denoising import encode_prompts, predict
from fusion.models.noise_schedule import forward_process
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_defaults
from fusion.progress import units

PROMPTS = ("a {token}", "a {token} on a blue background", "a {token} on the left of a house")
PAIR = "a {} on the left and a {} on the right"
CONCEPT_FREE = ("a dog on a blue background", "a red car on a white background", "a house beside a tree")
NOISE_LEVELS = 6  # for every prompt


@dataclass(frozen=True)
class OutputErrors:
    """Of each concept, and of concept-free prompts, under one gating."""

    output_error: dict[str, float]  # token -> mean over prompts and noise levels
    drift: float


def measure_output_errors(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    gatings: Sequence[str | None],
    *,
    prompts: Sequence[str],
    concept_free: Sequence[str],
    seed: int,
    clip_skip: int = 0,
) -> list[OutputErrors]:
    """Attach all adapters at once and compare the UNet's predictions with each concept alone, and with the base.

    Each concept alone is gated as in its file; each of `gatings`, as in attach, applies to all together and gives one
    result. `prompts` hold "{token}". Raises ConfigError for a prompt without it.
    """
    if incomplete := [prompt for prompt in prompts if "{token}" not in prompt]:
        raise ConfigError(f"Prompt '{incomplete[0]}' has no {{token}} to put the concept in.")
    references = {
        token: concept_reference(
            pipe, single, [prompt.replace("{token}", token) for prompt in prompts], seed, clip_skip
        )
        for adapter in adapters
        for token, single in concepts_of(adapter).items()
    }
    base = base_reference(pipe, list(concept_free), seed, clip_skip)
    results: list[OutputErrors] = []
    for gating in gatings:
        with ExitStack() as attached:
            for adapter in adapters:
                attached.enter_context(attach(pipe, adapter, gating))
            errors = {token: reference.error(pipe) for token, reference in references.items()}
            results.append(OutputErrors(errors, base.error(pipe)))
    return results


def concepts_of(adapter: Adapter) -> dict[str, Adapter]:
    """For each concept's token, the adapter with its branches alone, at the strengths they have here."""
    tokens = [concept.token for concept in adapter.info.concepts]

    def tokens_of(branch: Branch) -> Sequence[str]:
        """An ungated branch belongs to the concept of its name, or else to all."""
        return branch.gate or [token for token in tokens if token.strip("<>") == branch.name] or tokens

    return {t: replace(adapter, branches=tuple(b for b in adapter.branches if t in tokens_of(b))) for t in tokens}


@dataclass(frozen=True)
class DistillationErrors:
    """How far the UNet's predictions with a distilled adapter are from those with the gated adapters."""

    output_error: dict[str, float]  # token -> mean over its prompts
    several: float | None  # on prompts with two concepts; None where there is one concept
    drift: float  # on prompts without concepts

    def rows(self) -> list[tuple[str, str]]:
        """A heading, one row per concept, pairs, and the drift."""
        errors = [(token, f"{error:.3f}") for token, error in self.output_error.items()]
        pairs = [] if self.several is None else [("two in one prompt", f"{self.several:.3f}")]
        return [("output error", "distilled"), *errors, *pairs, ("drift without concepts", f"{self.drift:.4f}")]


def measure_distillation(
    pipe: Pipeline,
    distilled: Adapter,
    gated: Sequence[Adapter],
    *,
    prompts: Sequence[str] = PROMPTS,
    concept_free: Sequence[str] = CONCEPT_FREE,
    seed: int = 0,
    clip_skip: int = 0,
) -> DistillationErrors:
    """Compare the UNet's predictions with a distilled adapter, and with the `gated` ones it was distilled from.

    An error of 1 is as large as what the gated adapters change on the same prompts. `prompts` hold "{token}". Raises
    TokenConflict where they are not the concepts of the distilled one.
    """
    whole = fuse(gated, allow_overlap=True)
    tokens = [concept.token for concept in whole.info.concepts]
    if incomplete := [prompt for prompt in prompts if "{token}" not in prompt]:
        raise ConfigError(f"Prompt '{incomplete[0]}' has no {{token}} to put the concept in.")
    if missing := {*tokens} - {concept.token for concept in distilled.info.concepts}:
        raise TokenConflict(
            f"'{distilled.info.name}' has no concept {sorted(missing)[0]}; it was distilled from others."
        )
    one = {
        t: concept_reference(pipe, whole, [prompt.replace("{token}", t) for prompt in prompts], seed, clip_skip)
        for t in tokens
    }
    pairs = [PAIR.format(*two) for two in pairwise([*tokens, tokens[0]])] if len(tokens) > 1 else []
    several = concept_reference(pipe, whole, pairs, seed, clip_skip) if pairs else None
    free = base_reference(pipe, list(concept_free), seed, clip_skip)
    with attach(pipe, distilled):
        errors = {token: reference.error(pipe) for token, reference in one.items()}
        return DistillationErrors(errors, several and several.error(pipe), free.error(pipe))


@dataclass(frozen=True)
class ReferencePrediction:
    """What the UNet predicts for some noisy latents under a reference setting, to compare other settings with."""

    prompts: list[str]
    noisy: Tensor  # (prompts · NOISE_LEVELS, C, H, W)
    times: Tensor  # (prompts · NOISE_LEVELS)
    prediction: Tensor  # like noisy
    scale: Tensor  # mean square that counts as an error of 1
    clip_skip: int = 0

    def error(self, pipe: Pipeline) -> float:
        """Mean squared difference of the prediction of `pipe` as it is now, in units of `scale`."""
        now = _predictions(pipe, self.prompts, self.noisy, self.times, self.clip_skip)
        difference = now - self.prediction
        return float(difference.square().mean() / self.scale) if self.scale > 0 else 0.0


def concept_reference(
    pipe: Pipeline, single: Adapter, prompts: list[str], seed: int, clip_skip: int = 0
) -> ReferencePrediction:
    """The prediction with a concept's own adapter on its prompts; an error of 1 is as large as its whole effect."""
    inputs = prompts, *_noisy(pipe, [single], prompts, seed, clip_skip)
    with attach(pipe, single):
        alone = _predictions(pipe, *inputs, clip_skip)
    with attach(pipe, replace(single, branches=())):  # the base with the concept's embeddings alone
        base = _predictions(pipe, *inputs, clip_skip)
    return ReferencePrediction(*inputs, alone, (alone - base).square().mean(), clip_skip)


def base_reference(pipe: Pipeline, prompts: list[str], seed: int, clip_skip: int = 0) -> ReferencePrediction:
    """The base's prediction on prompts without concepts; an error of 1 is as large as the prediction itself."""
    inputs = prompts, *_noisy(pipe, [], prompts, seed, clip_skip)
    base = _predictions(pipe, *inputs, clip_skip)
    return ReferencePrediction(*inputs, base, base.square().mean(), clip_skip)


def base_clip_skip(pipe: Pipeline, config: GenerationConfig | None = None) -> int:
    """That of a drawing with these settings, by default what the base's `fusion.toml` sets."""
    config = config or GenerationConfig(prompt="")
    return config.with_base_defaults(base_defaults(pipe, "generation")).clip_skip


def _noisy(
    pipe: Pipeline, adapters: Sequence[Adapter], prompts: list[str], seed: int, clip_skip: int
) -> tuple[Tensor, Tensor]:
    """Noisy latents (prompts · NOISE_LEVELS, C, H, W) of drawn pictures, and their timesteps; equal in every call."""
    configs = [GenerationConfig(prompt=prompt, seed=seed, clip_skip=clip_skip) for prompt in prompts]
    drawings = units("drawing pictures to measure on", configs)
    pictures = [generate(pipe, config, adapters)[0].image for config in drawings]
    schedule: Any = forward_process(pipe)
    clean = encode_pixels(pipe, pipe.image_processor.preprocess(pictures)).to(pipe.unet.dtype)
    clean = clean.repeat_interleave(NOISE_LEVELS, dim=0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    total = schedule.config.num_train_timesteps
    times = torch.linspace(0.15 * total, 0.99 * total, NOISE_LEVELS).long().repeat(len(prompts)).to(clean.device)
    return schedule.add_noise(clean, noise, times), times


@torch.no_grad()
def _predictions(pipe: Pipeline, prompts: list[str], noisy: Tensor, times: Tensor, clip_skip: int) -> Tensor:
    """The UNet's predictions for every prompt at every level, in float32."""
    embeddings = (encode_prompts(pipe, [prompt] * NOISE_LEVELS, clip_skip) for prompt in prompts)
    parts = zip(noisy.split(NOISE_LEVELS), times.split(NOISE_LEVELS), embeddings, strict=True)
    return torch.cat([predict(pipe, *part).float() for part in parts])
