"""What the layers of a base are given while concepts are prompted: second moments of their inputs.

Every concept is attached alone, its prompts are drawn from noise in a few steps, and each layer's inputs are counted:
as the concept's own where its change acts (at its tokens, where it is gated by them), else as inputs to be left alone.
Concept-free prompts, asked while the change is silent, count to the latter. No picture is decoded, no input is kept.

Shapes: B prompts, I in_features, N rows of an input.
"""

import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fusion.adapters.adapter import Adapter
from fusion.layer_names import component_of
from fusion.models.adapted_layers import AdaptedConv1x1, AdaptedLinear
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts, predict
from fusion.models.layer_sites import Site, sites
from fusion.models.pipeline import Pipeline
from fusion.spectral.moments import Moment, Moments

PROMPTS = ("a {token}", "a photo of a {token}", "a {token} on a white background", "a {token} beside a tree")
CONCEPT_FREE = (
    "a photo", "a house", "a white background", "a man beside a woman", "a tree and a car on a green background",
    "a red apple on a table", "two animals in the snow", "a yellow flower on the left of a blue ball",
)  # fmt: skip
STEPS = 5  # from noise to picture, so levels of noise at which the UNet is listened to
BATCH = 4  # prompts at a time


def record_moments(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    *,
    prompts: Sequence[str] | None = None,
    concept_free: Sequence[str] = CONCEPT_FREE,
    steps: int = STEPS,
    seed: int = 0,
) -> list[Moments]:
    """The moments of each adapter, at every layer that any of them changes.

    `prompts` hold "{token}" where a concept's token goes, or none of it: the trigger words of an imported LoRA. An
    adapter without a token, and without such prompts, acts everywhere: its own inputs are those of concept-free
    prompts. To those, each noun of the concepts is added. Raises whatever attach raises.
    """
    layers = list(dict.fromkeys(name for adapter in adapters for name in adapter.layer_names))
    made: list[Moments] = []
    for adapter in adapters:
        tokens = list(dict.fromkeys(token for branch in adapter.branches for token in branch.gate))
        tokens = tokens or [concept.token for concept in adapter.info.concepts]
        asked = _worded(prompts or (PROMPTS if tokens else ()), tokens)
        nouns = [f"a {c.noun}" for c in adapter.info.concepts if c.token in tokens and c.noun]
        with attach(pipe, adapter) as handle, _Recorder(pipe, layers) as recorder, torch.no_grad():
            draws = any(component_of(layer) == "unet" for layer in layers)
            _imagine(pipe, asked or concept_free, steps if draws else 0, seed)
            if asked:
                for branch in adapter.branches:
                    handle.strength(branch.name, 0.0)
                recorder.silent = True
                _imagine(pipe, list(dict.fromkeys([*concept_free, *nouns])), steps if draws else 0, seed)
            made.append(Moments(recorder.moments(), everywhere=not asked))
    return made


def record_base(
    pipe: Pipeline, layers: Iterable[str], prompts: Sequence[str], *, steps: int = STEPS, seed: int = 0
) -> dict[str, Moment]:
    """What the layers hear as the pipeline is now, as inputs to be left alone."""
    names = list(layers)
    with _Recorder(pipe, names) as recorder, torch.no_grad():
        recorder.silent = True
        draws = any(component_of(layer) == "unet" for layer in names)
        _imagine(pipe, prompts, steps if draws else 0, seed)
    return recorder.moments()


def _worded(prompts: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Every prompt with every token; those without a place for one as they are."""
    worded = [prompt.replace("{token}", token) for prompt in prompts for token in tokens or ("",)]
    return list(dict.fromkeys(worded))


def _imagine(pipe: Pipeline, prompts: Sequence[str], steps: int, seed: int) -> None:
    """Encode prompts, and draw them by DDIM without guidance, for the sake of what the layers hear."""
    schedule: Any = DDIMScheduler.from_config(pipe.scheduler.config)
    side, shape = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    generator = torch.Generator("cpu").manual_seed(seed)
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        conditioning = encode_prompts(pipe, part)
        latents = torch.randn(len(part), shape, side, side, generator=generator).to(pipe.unet.device, pipe.unet.dtype)
        if steps:
            schedule.set_timesteps(steps)
        for time in schedule.timesteps if steps else ():
            times = torch.full((len(part),), int(time), device=latents.device)
            latents = schedule.step(predict(pipe, latents, times, conditioning), time, latents).prev_sample


class _Sum:
    """Σ x xᵀ in float64 on the CPU, and of how many."""

    def __init__(self, width: int) -> None:
        self.total, self.count = torch.zeros(width, width, dtype=torch.float64), 0

    def add(self, rows: Tensor) -> None:
        exact = rows.detach().to("cpu", torch.float64)
        self.total.addmm_(exact.T, exact)
        self.count += len(rows)

    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


class _LayerInputs:
    """What one layer hears, or several that are always given the same tensor (q, k, v; all cross-attention)."""

    def __init__(self, width: int) -> None:
        self.own, self.free = _Sum(width), _Sum(width)
        self.last: weakref.ref[Tensor] | None = None

    def heard(self, x: Tensor) -> bool:
        return self.last is not None and self.last() is x

    def moment(self) -> Moment:
        count = max(self.own.count + self.free.count, 1)
        squares = float(self.own.total.diagonal().sum() + self.free.total.diagonal().sum())
        return Moment(self.own.mean(), self.free.mean(), squares / count / self.own.total.shape[0])


class _Recorder:
    """Hooks on layers; leaving the context takes them off."""

    def __init__(self, pipe: Pipeline, layers: Iterable[str]) -> None:
        self.silent = False  # nothing acts: all is to be left alone
        self._ears: dict[str, _LayerInputs] = {}
        found = sites(pipe)
        self._hooks = [self._listen(name, found[name]) for name in layers]

    def _listen(self, name: str, site: Site) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            ear = self._ears.get(name) or next((ear for ear in self._ears.values() if ear.heard(x)), None)
            rows = x.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else x
            ear = self._ears[name] = ear or _LayerInputs(rows.shape[-1])
            if not ear.heard(x):
                ear.last = weakref.ref(x)
                self._count(ear, rows.flatten(0, -2), acting(layer, rows))

        return site.module.register_forward_pre_hook(hook)

    def _count(self, ear: _LayerInputs, rows: Tensor, own: Tensor) -> None:
        own = torch.zeros_like(own) if self.silent else own
        ear.own.add(rows[own])
        ear.free.add(rows[~own])

    def moments(self) -> dict[str, Moment]:
        made = {id(ear): ear.moment() for ear in self._ears.values()}
        return {name: made[id(ear)] for name, ear in self._ears.items()}

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()


def acting(layer: nn.Module, rows: Tensor) -> Tensor:
    """Which rows of a layer's input (…, I), flattened, any branch acts on: (N,) of bool."""
    branches = layer.branches.values() if isinstance(layer, AdaptedLinear | AdaptedConv1x1) else ()
    where = torch.zeros(rows.shape[:-1].numel(), dtype=torch.bool, device=rows.device)  # (N,)
    for branch in branches:
        if branch.gate is None:
            where[:] = True
        elif (open_rows := branch.gate.scope().open_rows(branch.gate.tokens, rows)) is not None:
            where[open_rows] = True
    return where
