"""How much changes of weights interfere with each other: exact, on factors.

These are numbers about weights. Orthogonal changes do not imply that concepts are isolated; pictures have to be
measured.

Shapes: N changes compared. A Gram matrix may be summed over layers before it is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.spectral.delta import Delta

_TINY = torch.finfo(torch.float64).tiny


def gram(deltas: Sequence[Delta | None]) -> Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ of N changes of one weight, (N, N) float64; None changes nothing."""
    matrix = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for i, first in enumerate(deltas):
        for j, second in enumerate(deltas[: i + 1]):
            if first is not None and second is not None:
                matrix[i, j] = matrix[j, i] = first.inner(second)
    return matrix


def cosines(gram: Tensor) -> Tensor:
    """⟨ΔWᵢ, ΔWⱼ⟩ / ‖ΔWᵢ‖‖ΔWⱼ‖, (N, N) in −1 … 1; 0 where either changes nothing."""
    norm = gram.diagonal().clamp(min=0).sqrt()
    return gram / torch.outer(norm, norm).clamp(min=_TINY)


def retention(gram: Tensor) -> Tensor:
    """⟨ΣΔW, ΔWᵢ⟩ / ‖ΔWᵢ‖², (N,): the part of each change that remains in the sum. 1: nothing lost, nothing added."""
    return gram.sum(dim=1) / gram.diagonal().clamp(min=_TINY)


def energy_ratio(gram: Tensor) -> float:
    """‖ΣΔW‖ / max ‖ΔWᵢ‖: well above 1, the sum changes the weights more than any adapter was trained to."""
    return float((gram.sum().clamp(min=0) / gram.diagonal().max().clamp(min=_TINY)).sqrt())


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """‖Q₁ᵀ Q₂‖² / min(rank) for the column spans of (N, Q₁) and (N, Q₂): 0 disjoint, 1 one holds the other."""
    bases = [_span(matrix) for matrix in (first, second)]
    smaller = min(basis.shape[1] for basis in bases)
    return float((bases[0].T @ bases[1]).square().sum()) / smaller if smaller else 0.0


def _span(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the column span, (N, rank)."""
    U, S, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U[:, S.max() * 1e-9 < S] if S.numel() else U
