"""Interference between adapters, measured on the inputs of their layers, which the weights alone do not show.

From the second moments of `record_moments`, on factors; no picture is drawn. Adapters act as their LoRA exports would:
at every input, whatever their gates. X are the inputs of one layer while a concept is prompted, X₀ those it should
leave alone; every ratio is of root sums over all layers that both sides change.

Shapes: N adapters, one for each Moments. Each branch of a fused adapter counts as an adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter
from fusion.composition.fused_branches import split_branches
from fusion.errors import ConfigError
from fusion.models.layer_sites import matrix, sites
from fusion.models.pipeline import Pipeline
from fusion.spectral.delta import Delta
from fusion.spectral.moments import Moments, response

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class CrossTalk:
    """What N adapters do to each other's inputs, in the order of `names`."""

    names: list[str]
    ratio: list[list[float]]  # [i][j] = ‖ΔWᵢ Xⱼ‖ / ‖ΔWⱼ Xⱼ‖: 0 no change, 1 as large as the concept's own
    by_layer: dict[str, list[list[float]]]
    drift: list[float]  # ‖ΔWᵢ X₀‖ / ‖W X₀‖ on the inputs that i should leave alone

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def worst(self, count: int = 5) -> list[tuple[str, str, str, float]]:
        """The layers where an adapter acts most on the inputs of another: (layer, name, name of the other, ratio)."""
        pairs = [
            (layer, self.names[i], self.names[j], matrix[i][j])
            for layer, matrix in self.by_layer.items()
            for i in range(len(self.names))
            for j in range(len(self.names))
            if i != j
        ]
        return sorted(pairs, key=lambda pair: -pair[3])[:count]


def cross_talk(pipe: Pipeline, adapters: Sequence[Adapter], moments: Sequence[Moments]) -> CrossTalk:
    """Measure adapters against each other on a base; `moments` as recorded there, one for each branch.

    Raises ConfigError if there are more or fewer.
    """
    parts = _parts(adapters, moments)
    changes = [part.deltas() for part in parts]
    layers = list(dict.fromkeys(layer for change in changes for layer in change))
    energies = {layer: _energies(layer, changes, moments) for layer in layers}
    whole = torch.stack(list(energies.values())).sum(dim=0)  # (N, N)
    return CrossTalk(
        [part.info.name for part in parts],
        _ratios(whole).tolist(),
        {layer: _ratios(matrix).tolist() for layer, matrix in energies.items()},
        [_drift(pipe, change, each) for change, each in zip(changes, moments, strict=True)],
    )


def merge_error(fused: Adapter, adapters: Sequence[Adapter], moments: Sequence[Moments]) -> list[float]:
    """‖(ΔW − ΔWᵢ) Xᵢ‖ / ‖ΔWᵢ Xᵢ‖ for each adapter: 0 the same on its inputs, 1 as far off as without it.

    What gradient fusion minimises. Layers of `fused` where nothing was recorded are left out.
    """
    whole, errors = fused.deltas(), list[float]()
    for part, recorded in zip(_parts(adapters, moments), moments, strict=True):
        change, error, energy = part.deltas(), 0.0, 0.0
        for layer, delta in whole.items():
            if layer in recorded.layers:
                target = change.get(layer) or Delta.zero(*delta.shape)
                error += float(response(delta + target * -1.0, recorded.layers[layer].own) ** 2)
                energy += float(response(target, recorded.layers[layer].own) ** 2)
        errors.append((error / max(energy, _TINY)) ** 0.5)
    return errors


def _parts(adapters: Sequence[Adapter], moments: Sequence[Moments]) -> list[Adapter]:
    parts = [part for adapter in adapters for part in split_branches(adapter)]
    if len(parts) != len(moments):
        raise ConfigError(f"There are {len(parts)} adapters and branches, but moments of {len(moments)}.")
    return parts


def _energies(layer: str, changes: Sequence[Mapping[str, Delta]], moments: Sequence[Moments]) -> Tensor:
    """‖ΔWᵢ Xⱼ‖² at one layer, (N, N); 0 where i has no change or j no inputs."""
    result = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for i, change in enumerate(changes):
        for j, recorded in enumerate(moments):
            if layer in change and layer in recorded.layers:
                result[i, j] = response(change[layer], recorded.layers[layer].own) ** 2
    return result


def _ratios(energies: Tensor) -> Tensor:
    """‖ΔWᵢ Xⱼ‖ / ‖ΔWⱼ Xⱼ‖; 0 where concept j itself does nothing."""
    own = energies.diagonal()
    return torch.where(own > 0, energies / own.clamp(min=_TINY), 0.0).sqrt()


def _drift(pipe: Pipeline, change: Mapping[str, Delta], recorded: Moments) -> float:
    layers, changed, base = sites(pipe), 0.0, 0.0
    for layer in (layer for layer in change if layer in recorded.layers):
        weight, free = matrix(layers[layer]).to("cpu", torch.float64), recorded.layers[layer].free
        changed += float(response(change[layer], free) ** 2)
        base += float(((weight @ free) * weight).sum())
    return (changed / max(base, _TINY)) ** 0.5
