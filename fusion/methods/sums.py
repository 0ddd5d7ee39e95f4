"""Weighted sums: ΔW = Σ weightᵢ ΔWᵢ, with the weights as a function of the strengths.

direct_sum         weightᵢ = strengthᵢ. On disjoint slices this is the joint spectral merge, exactly.
average            weightᵢ = strengthᵢ / N: FedAvg, and what the paper's own code does.
energy_balanced    weightᵢ = c strengthᵢ with c so that ‖ΔW‖ = maxᵢ ‖strengthᵢ ΔWᵢ‖ over all layers together: the sum
                   changes the weights by no more than its largest part. Two orthogonal adapters of equal norm are
                   scaled by 0.71 each, two aligned ones by 0.5, as by the LoRA optimizers of ComfyUI.

Shapes: N adapters.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def direct_sum(strengths: Sequence[float], _gram: Callable[[], Tensor]) -> Sequence[float]:
    return tuple(strengths)


def average(strengths: Sequence[float], _gram: Callable[[], Tensor]) -> Sequence[float]:
    return tuple(strength / len(strengths) for strength in strengths)


def energy_balanced(strengths: Sequence[float], gram: Callable[[], Tensor]) -> Sequence[float]:
    """Where the sum is zero there is nothing to scale, and c is 1."""
    inner = gram()  # (N, N)
    s = inner.new_tensor(strengths)  # (N,)
    total, largest = s @ inner @ s, (s.square() * inner.diagonal()).max()
    scale = float((largest / total).sqrt()) if total > 0 else 1.0
    return tuple(strength * scale for strength in strengths)
