"""Second moments of the inputs of a base's layers while concepts are prompted.

Every concept is attached alone, and its prompts are denoised in a few steps. Each row of a layer's input counts to
`own` where the concept's change acts on it (at its tokens, if it is gated by them), else to `free`, the inputs that
fusing should leave unchanged. Concept-free prompts, run with the adapter at strength 0, count to `free` as well. No
picture is decoded and no input is stored.

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
from fusion.models.adapted_layers import AdaptedConv, AdaptedLinear
from fusion.models.attachment import attach
from fusion.models.denoising import check_denoises, encode_prompts, predict
from fusion.models.layer_sites import sites
from fusion.models.noise_schedule import check_noise
from fusion.models.pipeline import Pipeline, execution_device
from fusion.progress import OnProgress, reporter
from fusion.spectral.moments import Moment, Moments

PROMPTS = ("a {token}", "a photo of a {token}", "a {token} on a white background", "a {token} beside a tree")
CONCEPT_FREE = (
    "a photo", "a house", "a white background", "a man beside a woman", "a tree and a car on a green background",
    "a red apple on a table", "two animals in the snow", "a yellow flower on the left of a blue ball",
)  # fmt: skip
STEPS = 5  # denoising steps, so noise levels at which inputs are recorded
BATCH = 4  # prompts at a time


def record_moments(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    *,
    prompts: Sequence[str] | None = None,
    concept_free: Sequence[str] = CONCEPT_FREE,
    steps: int = STEPS,
    seed: int = 0,
    clip_skip: int = 0,
) -> list[Moments]:
    """The moments of each adapter, at every layer that any of them changes.

    `prompts` hold "{token}" where a concept's token goes, or none of it: the trigger words of an imported LoRA. An
    adapter without a token, and without such prompts, acts everywhere: its own inputs are those of concept-free
    prompts. To those, each noun of the concepts is added. Raises whatever attach raises.
    """
    layers = list(dict.fromkeys(name for adapter in adapters for name in adapter.layer_names))
    steps = steps if any(component_of(layer) == "unet" for layer in layers) else 0
    recorded: list[Moments] = []
    for adapter in adapters:
        tokens = list(dict.fromkeys(token for branch in adapter.branches for token in branch.gate))
        tokens = tokens or [concept.token for concept in adapter.info.concepts]
        own_prompts = _with_tokens(prompts or (PROMPTS if tokens else ()), tokens)
        nouns = [f"a {c.noun}" for c in adapter.info.concepts if c.token in tokens and c.noun]
        with attach(pipe, adapter) as attachment, _Recorder(pipe, layers) as recorder, torch.no_grad():
            _denoise(pipe, own_prompts or concept_free, steps, seed, clip_skip)
            if own_prompts:
                for branch in adapter.branches:
                    attachment.strength(branch.name, 0.0)
                recorder.concept_free = True
                _denoise(pipe, list(dict.fromkeys([*concept_free, *nouns])), steps, seed, clip_skip)
            recorded.append(Moments(recorder.moments(), everywhere=not own_prompts))
    return recorded


def record_base(
    pipe: Pipeline, layers: Iterable[str], prompts: Sequence[str], *, steps: int = STEPS, seed: int = 0,
    side: int | None = None, batch: int = BATCH, clip_skip: int = 0, on_progress: OnProgress | None = None,
) -> dict[str, Moment]:  # fmt: skip
    """The moments of what the layers are given as the pipeline is now, all of it as inputs to be left unchanged.

    `side` of the square latents (default: the base's own) and the `batch` of prompts decide how much memory it takes.
    `on_progress(done, total)` counts passes.
    """
    names = list(layers)
    steps = steps if any(component_of(name) == "unet" for name in names) else 0
    with _Recorder(pipe, names) as recorder, torch.no_grad():
        recorder.concept_free = True
        _denoise(pipe, prompts, steps, seed, side, batch, clip_skip, on_progress)
    return recorder.moments()


def _with_tokens(prompts: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Every prompt with every token; prompts without "{token}" as they are."""
    return list(dict.fromkeys(prompt.replace("{token}", token) for prompt in prompts for token in tokens or ("",)))


def _denoise(
    pipe: Pipeline, prompts: Sequence[str], steps: int, seed: int, side: int | None = None, batch: int = BATCH,
    clip_skip: int = 0, on_progress: OnProgress | None = None,
) -> None:  # fmt: skip
    """Encode prompts, and denoise latents by DDIM without guidance, so that the recorded layers are run."""
    if steps:
        check_noise(pipe.scheduler)
        check_denoises(pipe)
    schedule: Any = DDIMScheduler.from_config(pipe.scheduler.config)
    size, shape = side or int(pipe.unet.config.sample_size), pipe.unet.config.in_channels
    generator, device = torch.Generator("cpu").manual_seed(seed), execution_device(pipe, pipe.unet)
    passes, total = 0, -(-len(prompts) // batch) * max(steps, 1)
    report = on_progress or reporter("recording inputs of layers")
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        conditioning = encode_prompts(pipe, part, clip_skip)
        latents = torch.randn(len(part), shape, size, size, generator=generator).to(device, pipe.unet.dtype)
        if steps:
            schedule.set_timesteps(steps)
        for time in schedule.timesteps if steps else (None,):
            report(passes, total)
            if time is not None:
                times = torch.full((len(part),), int(time), device=latents.device)
                latents = schedule.step(predict(pipe, latents, times, conditioning), time, latents).prev_sample
            passes += 1


class _SecondMoment:
    """Σ x xᵀ in float64 on the CPU, and the number of rows x. Without rows it takes no memory."""

    def __init__(self, width: int) -> None:
        self.total, self.count = torch.zeros((), dtype=torch.float64).expand(width, width), 0

    def add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        exact = rows.detach().to("cpu", torch.float64)
        if not self.count:
            self.total = self.total.clone()
        self.total.addmm_(exact.T, exact)
        self.count += len(rows)

    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


class _LayerInputs:
    """The inputs of one layer, or of several that are always given the same tensor (q, k, v; all cross-attention)."""

    def __init__(self, width: int) -> None:
        self.own, self.free = _SecondMoment(width), _SecondMoment(width)
        self.last: weakref.ref[Tensor] | None = None

    def counted(self, x: Tensor) -> bool:
        return self.last is not None and self.last() is x

    def moment(self) -> Moment:
        count = max(self.own.count + self.free.count, 1)
        squares = float(self.own.total.diagonal().sum() + self.free.total.diagonal().sum())
        return Moment(self.own.mean(), self.free.mean(), squares / count / self.own.total.shape[0])


class _Recorder:
    """Hooks on layers; leaving the context removes them."""

    def __init__(self, pipe: Pipeline, layers: Iterable[str]) -> None:
        self.concept_free = False  # every row counts to `free`
        self._inputs: dict[str, _LayerInputs] = {}
        table = sites(pipe)
        # Convolutions of larger kernels have none: of their I·k·k inputs each, a matrix of all pairs is too large.
        self._hooks = [self._record(name, table[name].module) for name in layers if name in table]

    def _record(self, name: str, module: nn.Module) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            inputs = self._inputs.get(name) or next((i for i in self._inputs.values() if i.counted(x)), None)
            rows = x.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else x
            inputs = self._inputs[name] = inputs or _LayerInputs(rows.shape[-1])
            if not inputs.counted(x):
                inputs.last = weakref.ref(x)
                own = torch.zeros(rows.shape[:-1].numel(), dtype=torch.bool, device=x.device)  # (N,)
                if isinstance(layer, AdaptedLinear | AdaptedConv) and not self.concept_free:
                    own = layer.acts_on(rows)
                inputs.own.add(rows.flatten(0, -2)[own])
                inputs.free.add(rows.flatten(0, -2)[~own])

        return module.register_forward_pre_hook(hook)

    def moments(self) -> dict[str, Moment]:
        moments = {id(inputs): inputs.moment() for inputs in self._inputs.values()}
        return {name: moments[id(inputs)] for name, inputs in self._inputs.items()}

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
