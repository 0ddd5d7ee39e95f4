"""How much of each concept survives fusion, by what the UNet says: no image metric needed (method.md, section 5).

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
from fusion.generation import generate
from fusion.models.conditioning import encode_prompts, predict
from fusion.models.injection import attach

PROMPTS = ("a {token}", "a {token} on a blue background", "a {token} on the left of a house")
CONCEPT_FREE = ("a dog on a blue background", "a red car on a white background", "a house beside a tree")


@dataclass(frozen=True)
class Survival:
    """Per concept, and for concept-free prompts, under one gating."""

    gating: str  # "file", "tokens" or "none"
    output_error: dict[str, float]  # token -> mean over prompts and noise levels
    drift: float

    @property
    def mean_error(self) -> float:
        return sum(self.output_error.values()) / len(self.output_error) if self.output_error else 0.0


def measure_survival(
    pipe: Any,
    adapters: Sequence[Adapter],
    *,
    gating: str | None = None,
    prompts: Sequence[str] = PROMPTS,
    concept_free: Sequence[str] = CONCEPT_FREE,
    levels: int = 6,
    seed: int = 0,
) -> Survival:
    """Attach all adapters at once and hold what the UNet says against each concept alone, and against the base.

    Each concept alone is taken as its file gates it; `gating` applies to all together. `prompts` hold "{token}".
    Raises ConfigError for a prompt without it.
    """
    if strange := [prompt for prompt in prompts if "{token}" not in prompt]:
        raise ConfigError(f"Prompt '{strange[0]}' has no {{token}} to put the concept in.")
    singles = [single for adapter in adapters for single in concepts_of(adapter)]
    errors = {
        token: _output_error(
            pipe, adapters, single, [p.replace("{token}", token) for p in prompts], gating, levels, seed
        )
        for token, single in singles
    }
    drift = _drift(pipe, adapters, list(concept_free), gating, levels, seed)
    return Survival(gating or "file", errors, drift)


def concepts_of(adapter: Adapter) -> list[tuple[str, Adapter]]:
    """Each concept of an adapter with the adapter that teaches it alone, at the strength it has here."""
    found: list[tuple[str, Adapter]] = []
    for concept in adapter.info.concepts:
        own = tuple(b for b in adapter.branches if concept.token in (b.gate or _tokens(adapter, b)))
        info = replace(adapter.info, name=concept.token.strip("<>"), concepts=(concept,))
        gated = tuple(replace(b, gate=(concept.token,) if b.gate else ()) for b in own)
        found.append((concept.token, Adapter(info, gated, {concept.token: adapter.tokens[concept.token]})))
    return found


def _tokens(adapter: Adapter, branch: Branch) -> tuple[str, ...]:
    """The concepts an ungated branch may stand for: the one of its name, or all."""
    named = [c.token for c in adapter.info.concepts if c.token.strip("<>") == branch.name]
    return tuple(named or [c.token for c in adapter.info.concepts])


def _output_error(
    pipe: Any,
    adapters: Sequence[Adapter],
    single: Adapter,
    prompts: list[str],
    gating: str | None,
    levels: int,
    seed: int,
) -> float:
    noisy, times = _noised(pipe, [single], prompts, levels, seed)
    with attach(pipe, single, "none" if not single.gated else None):
        alone = _predictions(pipe, prompts, noisy, times)
    with _all(pipe, adapters, gating):
        fused = _predictions(pipe, prompts, noisy, times)
    with _words_only(pipe, single):
        base = _predictions(pipe, prompts, noisy, times)
    return _ratio((fused - alone).square().mean(), (alone - base).square().mean())


def _drift(
    pipe: Any, adapters: Sequence[Adapter], prompts: list[str], gating: str | None, levels: int, seed: int
) -> float:
    noisy, times = _noised(pipe, [], prompts, levels, seed)
    base = _predictions(pipe, prompts, noisy, times)
    with _all(pipe, adapters, gating):
        fused = _predictions(pipe, prompts, noisy, times)
    return _ratio((fused - base).square().mean(), base.square().mean())


def _all(pipe: Any, adapters: Sequence[Adapter], gating: str | None) -> ExitStack:
    stack = ExitStack()
    for adapter in adapters:
        stack.enter_context(attach(pipe, adapter, gating))
    return stack


def _words_only(pipe: Any, single: Adapter) -> Any:
    """The base that knows the concept's word but nothing of its layers."""
    return attach(pipe, replace(single, branches=()))


def _noised(
    pipe: Any, adapters: Sequence[Adapter], prompts: list[str], levels: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Noisy latents (prompts · levels, C, H, W) of drawn pictures, and their timesteps; always the same ones."""
    pictures = [generate(pipe, prompt, adapters=adapters, seed=seed)[0].image for prompt in prompts]
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(pictures).to(pipe.vae.device, pipe.vae.dtype)
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    total = schedule.config.num_train_timesteps
    times = torch.linspace(0.15 * total, 0.99 * total, levels).long().repeat(len(prompts))
    clean = clean.repeat_interleave(levels, dim=0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    times = times.to(clean.device)
    return schedule.add_noise(clean, noise, times), times


def _predictions(pipe: Any, prompts: list[str], noisy: Tensor, times: Tensor) -> Tensor:
    """The UNet's predictions for every prompt at every level, in float32."""
    per_prompt = len(noisy) // len(prompts)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    made: list[Tensor] = []
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            rows = slice(i * per_prompt, (i + 1) * per_prompt)
            conditioning = encode_prompts(pipe, [prompt] * per_prompt)
            sizes = [(side, side, 0, 0, side, side)] * per_prompt
            made.append(predict(pipe, noisy[rows], times[rows], conditioning, sizes).float())
    return torch.cat(made)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator / denominator) if float(denominator) > 0 else 0.0
