"""The contract of all fusion methods: the changes several adapters make to one weight become one change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

from fusion.spectral.delta import Delta


class FusionMethod(Protocol):
    """Called once per layer, with the Deltas of the adapters that change it and their strengths, in one order.

    Contract, tested for every entry of METHODS: the order of adapters does not matter, equal inputs give equal bits,
    and the shape of ΔW is kept.
    """

    def __call__(self, layer: str, deltas: Sequence[Delta], strengths: Sequence[float]) -> Delta: ...


@dataclass(frozen=True)
class LinearMethod:
    """ΔW = Σ weightᵢ ΔWᵢ with weights that depend on the strengths alone.

    Being linear it can be carried out on whole adapters, branch by branch: types, bases and gates survive, exactly.
    """

    weights: Callable[[Sequence[float]], Sequence[float]]

    def __call__(self, layer: str, deltas: Sequence[Delta], strengths: Sequence[float]) -> Delta:
        return reduce(add, (d * w for d, w in zip(deltas, self.weights(strengths), strict=True)))
