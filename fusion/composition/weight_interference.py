"""Interference between adapters, measured in their weights: exact numbers about ΔW, not about pictures.

Shapes: N adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fusion.adapters.adapter import Adapter
from fusion.composition.fused_branches import split_branches
from fusion.progress import units
from fusion.spectral.delta import Delta
from fusion.spectral.interference import cosines, energy_ratio, gram, retention, subspace_overlap


@dataclass(frozen=True)
class Interference:
    """How N adapters interfere with each other; every matrix is (N, N) in the order of `names`."""

    names: list[str]
    cosine: list[list[float]]  # over all layers together
    by_layer: dict[str, list[list[float]]]  # the same layer by layer
    retention: list[float]  # of each in the sum of all: 1 nothing lost or added
    energy_ratio: float  # norm of the sum over the largest of the parts
    # Of output and input directions, mean over shared layers: 0 disjoint … 1. From `interference` only.
    column_overlap: list[list[float]] = field(default_factory=list[list[float]])
    row_overlap: list[list[float]] = field(default_factory=list[list[float]])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def worst(self, count: int = 5) -> list[tuple[str, str, str, float]]:
        """The layers where two adapters are most alike: (layer, first, second, cosine), by magnitude."""
        pairs = [
            (layer, self.names[i], self.names[j], matrix[i][j])
            for layer, matrix in self.by_layer.items()
            for i in range(len(self.names))
            for j in range(i)
        ]
        return sorted(pairs, key=lambda pair: -abs(pair[3]))[:count]


def interference(adapters: Sequence[Adapter]) -> Interference:
    """Measure adapters against each other, a fused one as its branches."""
    parts = [part for adapter in adapters for part in split_branches(adapter)]
    changes = _changes(parts)
    return replace(
        _cosines(parts, changes),
        column_overlap=_overlaps([{n: delta.up for n, delta in change.items()} for change in changes]),
        row_overlap=_overlaps([{n: delta.down.T for n, delta in change.items()} for change in changes]),
    )


def cosine_interference(adapters: Sequence[Adapter]) -> Interference:
    """The same without the overlaps of directions, which take an SVD for each layer and pair."""
    parts = [part for adapter in adapters for part in split_branches(adapter)]
    return _cosines(parts, _changes(parts))


def _changes(parts: Sequence[Adapter]) -> list[dict[str, Delta]]:
    return [part.deltas() for part in units("computing the adapters' changes", parts)]


def _cosines(parts: Sequence[Adapter], changes: Sequence[Mapping[str, Delta]]) -> Interference:
    layers = units("comparing layers", list(dict.fromkeys(layer for change in changes for layer in change)))
    grams = {layer: gram([change.get(layer) for change in changes]) for layer in layers}
    total = sum(grams.values(), torch.zeros(len(parts), len(parts), dtype=torch.float64))
    return Interference(
        names=[part.info.name for part in parts],
        cosine=cosines(total).tolist(),
        by_layer={layer: cosines(matrix).tolist() for layer, matrix in grams.items()},
        retention=retention(total).tolist(),
        energy_ratio=energy_ratio(total),
    )


def _overlaps(spans: list[dict[str, torch.Tensor]]) -> list[list[float]]:
    """Mean overlap of column spans over shared layers, (N, N)."""
    result = [[1.0] * len(spans) for _ in spans]
    for i, first in enumerate(units("comparing directions", spans)):
        for j, second in enumerate(spans[:i]):
            values = [subspace_overlap(first[layer], second[layer]) for layer in first if layer in second]
            result[i][j] = result[j][i] = sum(values) / len(values) if values else 0.0
    return result
