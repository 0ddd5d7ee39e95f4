"""Several adapters become one, in one exact step. Closed: adapters in, an adapter out.

Knows nothing of files or pictures.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Provenance, checked_strengths
from fusion.adapters.combination_checks import check_bases, check_tokens, quoted, slice_clashes
from fusion.adapters.lora import LoraLayer
from fusion.composition.fused_branches import split_branches
from fusion.distillation.config import DistillationConfig
from fusion.distillation.loop import distill
from fusion.errors import ConfigError, SliceConflict, UnknownName, closest
from fusion.methods import METHODS
from fusion.methods.method import AdapterMerge, MethodOptions, WeightedSum
from fusion.models.attachment import effective_gates
from fusion.models.base_check import with_base_weights
from fusion.models.binding import joined_words
from fusion.models.input_moments import record_moments
from fusion.models.pipeline import Pipeline
from fusion.progress import units
from fusion.spectral.delta import Delta, check_compression
from fusion.spectral.interference import gram
from fusion.spectral.moments import Moments

logger = logging.getLogger(__name__)


def fuse(
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None = None,
    method: str = "direct_sum",
    *,
    options: MethodOptions = MethodOptions(),
    pipe: Pipeline | None = None,
    moments: Sequence[Moments] | None = None,
    gating: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    allow_overlap: bool = False,
    name: str | None = None,
    distillation: DistillationConfig | None = None,
) -> Adapter:
    """One adapter that does what all of `adapters` do.

    Weighted sums keep every branch with its basis, its gate and its strength times the method's weight: this is exact,
    and any concept can be removed again. Other methods merge the changes of each layer into one, whose concepts no gate
    can separate. `rank` or `energy` compress the merged change (and so also merge under a weighted sum).
    Methods that need moments of the layers' inputs record them on `pipe`, or take those of `record_moments`, one for
    each branch of each adapter. `options` are the methods' own.
    `gating` as in attach: "none" drops the gates, "tokens" gates every branch by its adapter's own tokens.
    Method "distill" learns one ungated LoRA on `pipe` from gated adapters; `distillation` has its settings, `rank` and
    the seed of `options` take precedence, and no checkpoints are written: `fusion.distill` does it step by step.
    `allow_overlap` lets direct_sum add adapters whose slices overlap though no different tokens gate them.

    Raises SliceConflict when such slices overlap under direct_sum, TokenConflict, BaseMismatch, UnknownName;
    ConfigError for a wrong number, and where moments are needed and neither they nor a pipe are given.
    """
    if method not in METHODS:
        raise UnknownName(
            f"No fusion method is called '{method}'{closest(method, METHODS)} There are: {quoted(METHODS)}."
        )
    if not adapters:
        raise ConfigError("There is nothing to fuse; give at least one adapter.")
    check_compression(rank, energy)
    values = checked_strengths(adapters, strengths)
    regated = [_with_gates(adapter, gating) for adapter in adapters]
    if pipe is not None:
        regated = [with_base_weights(pipe, adapter) for adapter in regated]
    check_bases(regated)
    check_tokens(regated)
    if method == "direct_sum" and not allow_overlap and (clashes := slice_clashes(regated)):
        raise SliceConflict(f"{clashes[0].sentence()} {clashes[0].advice()}")
    if isinstance(METHODS[method], AdapterMerge):
        return _distilled(regated, values, method, pipe, distillation, options, rank, energy, name)
    _warn_about_clip_skips(regated)
    merge = rank is not None or energy is not None or not isinstance(METHODS[method], WeightedSum)
    if merge and any(adapter.gated for adapter in regated):
        logger.warning(
            "Merged into one change per layer, '%s' cannot be gated: it acts on every token.", name or method
        )
    if METHODS[method].moments:
        pairs = [(part, value) for a, value in zip(regated, values, strict=True) for part in split_branches(a)]
        parts, values_of_parts = [part for part, _ in pairs], [value for _, value in pairs]
        fused = _merged(parts, values_of_parts, method, options, _moments(parts, method, pipe, moments))
    elif merge:
        fused = _merged(regated, values, method, options, ())
    else:
        fused = _weighted(regated, values, method)
    if rank is not None or energy is not None:
        fused = _compressed(fused, rank, energy)
    info = _fused_info(regated, values, method, options, name)
    return Adapter(info, fused, {t: rows for a in regated for t, rows in a.tokens.items()})


def _distilled(
    adapters: list[Adapter], strengths: list[float], method: str, pipe: Pipeline | None,
    config: DistillationConfig | None, options: MethodOptions, rank: int | None, energy: float | None,
    name: str | None,
) -> Adapter:  # fmt: skip
    """All steps of a distillation, for the adapter of the last."""
    if pipe is None:
        raise ConfigError(f"Method '{method}' learns on a base: pass pipe=; on the command line, --base.")
    if energy is not None:
        raise ConfigError(f"Method '{method}' learns a LoRA of one rank: give rank, not energy.")
    changes = {"rank": rank, "output_name": name, "seed": options.seed or None}
    settings = {key: value for key, value in changes.items() if value is not None}
    config = (config or DistillationConfig.model_validate({})).updated({**settings, "checkpointing_steps": 0})
    *_, last = distill(pipe, adapters, config, strengths=strengths)
    assert last.adapter is not None
    return last.adapter


def _weighted(adapters: list[Adapter], strengths: list[float], method: str) -> tuple[Branch, ...]:
    """A weighted sum, branch by branch."""
    weights = _weights(method, strengths, [adapter.deltas for adapter in adapters])
    branches = [
        replace(branch, strength=branch.strength * weight, name=_label(adapter, branch))
        for adapter, weight in zip(adapters, weights, strict=True)
        for branch in adapter.branches
    ]
    return tuple(_unique(branches))


def _weights(
    method: str, strengths: Sequence[float], changes: Sequence[Callable[[], Mapping[str, Delta]]]
) -> Sequence[float]:
    """The weights of a weighted sum; `changes` are computed if the method needs their inner products."""
    row = METHODS[method]
    assert isinstance(row, WeightedSum)

    def whole_gram() -> Tensor:
        deltas = [change() for change in changes]
        layers = dict.fromkeys(layer for change in deltas for layer in change)
        return torch.stack([gram([change.get(layer) for change in deltas]) for layer in layers]).sum(dim=0)

    return row.weights(strengths, whole_gram)


def _moments(
    parts: list[Adapter], method: str, pipe: Pipeline | None, moments: Sequence[Moments] | None
) -> Sequence[Moments]:
    """One for each part: those given, or recorded now."""
    if moments is None:
        if pipe is None:
            raise ConfigError(
                f"Method '{method}' works on the inputs of each adapter's layers, so it needs a base: pass pipe=, or "
                "moments= recorded before; on the command line, --base."
            )
        return record_moments(pipe, parts)
    if len(moments) != len(parts):
        raise ConfigError(f"Give moments for each of {quoted(p.info.name for p in parts)}; got {len(moments)}.")
    return moments


def _merged(
    adapters: list[Adapter], strengths: list[float], method: str, options: MethodOptions, moments: Sequence[Moments]
) -> tuple[Branch, ...]:
    """Any method, layer by layer on whole changes."""
    changes = [adapter.deltas() for adapter in adapters]
    if any(each.everywhere for each in moments):
        options = replace(options, neutral=0.0)  # what one concept should leave alone is another's own
    if isinstance(METHODS[method], WeightedSum):  # its weights belong to whole adapters
        strengths, method = list(_weights(method, strengths, [adapter.deltas for adapter in adapters])), "direct_sum"
    layers: dict[str, LoraLayer] = {}
    for layer in units("merging layers", list(dict.fromkeys(n for change in changes for n in change))):
        shape = next(change[layer].shape for change in changes if layer in change)
        # An adapter that does not change a layer takes part too: its inputs there are to be left as they are.
        parts = [change.get(layer) or Delta.zero(*shape) for change in changes]
        inputs = [each.layers.get(layer) for each in moments]
        merged = METHODS[method](layer, parts, strengths, moments=inputs, options=options)
        layers[layer] = LoraLayer(merged.up, merged.down)
    slices = tuple(dict.fromkeys(part for adapter in adapters for part in adapter.slices))
    targets = tuple(dict.fromkeys(t for adapter in adapters for branch in adapter.branches for t in branch.targets))
    return (Branch("+".join(a.info.name for a in adapters), "lora", layers, slices, targets),)


def _compressed(branches: tuple[Branch, ...], rank: int | None, energy: float | None) -> tuple[Branch, ...]:
    (branch,) = branches
    layers = units("compressing layers", list(branch.layers.items()))
    deltas = {name: layer.delta().detach().compress(rank, energy) for name, layer in layers}
    return (replace(branch, layers={name: LoraLayer(delta.up, delta.down) for name, delta in deltas.items()}),)


def _with_gates(adapter: Adapter, gating: str | None) -> Adapter:
    gates = effective_gates(adapter, gating)
    return replace(adapter, branches=tuple(replace(b, gate=gates[b.name]) for b in adapter.branches))


def _label(adapter: Adapter, branch: Branch) -> str:
    return branch.name if len(adapter.branches) > 1 else adapter.info.name


def _unique(branches: list[Branch]) -> Iterable[Branch]:
    """Branches with distinct names: the second 'dog' becomes 'dog-2'."""
    names: set[str] = set()
    for branch in branches:
        name, count = branch.name, 2
        while name in names:
            name, count = f"{branch.name}-{count}", count + 1
        names.add(name)
        yield replace(branch, name=name)


def _clip_skip(adapter: Adapter) -> Any:
    return adapter.info.provenance.settings.get("clip_skip")


def _warn_about_clip_skips(adapters: list[Adapter]) -> None:
    """Name adapters that were trained with different clip_skip, where it is known: a picture has one."""
    skips = [(adapter.info.name, skip) for adapter in adapters if isinstance(skip := _clip_skip(adapter), int)]
    if len({skip for _, skip in skips}) > 1:
        trained = ", ".join(f"'{name}' with {skip}" for name, skip in skips)
        logger.warning("Trained with different clip_skip: %s. A picture has one, so some may look different.", trained)


def _fused_info(
    adapters: list[Adapter], strengths: list[float], method: str, options: MethodOptions, name: str | None
) -> AdapterInfo:
    changed = {key: value for key, value in asdict(options).items() if value != getattr(MethodOptions(), key)}
    skips = set(map(_clip_skip, adapters))
    trained = {"clip_skip": skips.pop()} if len(skips) == 1 and None not in skips else {}
    return AdapterInfo(
        name=name or "+".join(adapter.info.name for adapter in adapters),
        base=next((adapter.info.base for adapter in adapters if adapter.info.base), None),
        concepts=tuple(concept for adapter in adapters for concept in adapter.info.concepts),
        provenance=Provenance(
            tool="fuse",
            parents=tuple(f"{a.info.name} {a.digest()[:12]}" for a in adapters),
            settings={"method": method, "strengths": strengths, **changed, **trained, **joined_words(adapters)},
        ),
    )
