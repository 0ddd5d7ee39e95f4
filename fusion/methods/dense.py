"""For rival methods that are defined number by number: changes as dense matrices, one layer at a time, in float32.

Shapes: O out_features, I in_features, N adapters that take part.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusion.spectral.delta import Delta


def taking_part(deltas: Sequence[Delta], strengths: Sequence[float]) -> list[Delta]:
    """strengthᵢ ΔWᵢ of the adapters whose strength is not zero."""
    return [delta * strength for delta, strength in zip(deltas, strengths, strict=True) if strength]


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """The share `density` of largest magnitude, zeros elsewhere."""
    from peft.utils.merge_utils import prune

    return matrix if density == 1 else prune(matrix, density, method="magnitude")


def total(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).sum(dim=0)


def elected_mean(matrices: Sequence[Tensor]) -> Tensor:
    """TIES' election: number by number, the mean of those that have the sign of the sum."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    stacked = torch.stack(list(matrices))  # (N, O, I)
    return disjoint_merge(stacked, calculate_majority_sign_mask(stacked))


def combined(
    combine: Callable[[Sequence[Tensor]], Tensor], matrices: Sequence[Tensor], shape: tuple[int, int]
) -> Delta:
    """What `combine` makes of the N matrices (O, I), exactly; no change where there are none."""
    return whole_delta(combine(matrices)) if matrices else Delta.zero(*shape)


def whole_delta(matrix: Tensor) -> Delta:
    """A dense matrix as a Delta, exactly: one factor is the identity, so the rank is min(O, I).

    A power of two evens out the factors, which is exact and spares float16 files the loss of small numbers.
    """
    out_features, in_features = matrix.shape
    largest = float(matrix.abs().max())
    even = 2.0 ** round(torch.tensor(largest).log2().item() / 2) if largest else 1.0
    if out_features <= in_features:
        return Delta(torch.eye(out_features).to(matrix) * even, matrix / even)
    return Delta(matrix / even, torch.eye(in_features).to(matrix) * even)
