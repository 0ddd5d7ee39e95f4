"""How much two changes of one weight get in each other's way: exact, on factors.

These are statements about weights. Orthogonal weights do not imply isolated behaviour; pictures have to be measured.
"""

import torch
from torch import Tensor

from fusion.spectral.delta import Delta


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator / denominator) if float(denominator) > 0 else 0.0


def cosine(first: Delta, second: Delta) -> float:
    """⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖, in −1 … 1; 0 if either changes nothing."""
    return _ratio(first.inner(second), first.norm() * second.norm())


def retention(total: Delta, part: Delta) -> float:
    """⟨ΔW, ΔWᵢ⟩ / ‖ΔWᵢ‖²: how much of a part survives in the total. 1 nothing lost; the mean of N gives about 1/N."""
    return _ratio(total.inner(part), part.inner(part))


def energy_ratio(total: Delta, parts: list[Delta]) -> float:
    """‖ΔW‖ / max ‖ΔWᵢ‖: well above 1, a sum is cooking the weight harder than any adapter was trained to."""
    return _ratio(total.norm(), torch.stack([part.norm() for part in parts]).max())


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """‖Q₁ᵀ Q₂‖² / min(rank) for the column spans of (N, Q₁) and (N, Q₂): 0 disjoint, 1 one holds the other."""
    bases = [_span(matrix) for matrix in (first, second)]
    smaller = min(basis.shape[1] for basis in bases)
    return float((bases[0].T @ bases[1]).square().sum()) / smaller if smaller else 0.0


def _span(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the column span, (N, rank)."""
    U, S, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U[:, S > S.max() * 1e-9] if S.numel() else U
