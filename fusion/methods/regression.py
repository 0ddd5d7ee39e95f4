"""The closed form of gradient fusion (Mix-of-Show, Gu et al. 2023, arXiv 2305.18292): one linear least-squares problem.

With Xᵢ the inputs of a layer while concept i is prompted, and X₀ inputs to be left alone, minimise over ΔW

    Σᵢ ‖(ΔW − strengthᵢ ΔWᵢ) Xᵢ‖² + λ ‖ΔW X₀‖² + ρ ‖ΔW‖²

With Cᵢ = Xᵢ Xᵢᵀ and M = Σᵢ Cᵢ + λ C₀ + ρ 1 the optimum is

    ΔW = Σᵢ strengthᵢ ΔWᵢ Cᵢ M⁻¹ = [up₁ … upₙ] · [strengthᵢ downᵢ Cᵢ M⁻¹]

so it stays in factors, exactly, of rank ΣQ. The same optimum as RegMean (Jin et al. 2022, arXiv 2212.09849), in which
X₀ and ρ are missing and the weights are others. With a strength of zero, ΔW is fitted to 0 on that concept's prompts.

Shapes: O out_features, I in_features, Q rank of a delta.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.methods.method import MergeContext
    from fusion.spectral.delta import Delta


def merge(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    """Solved in float64 by Cholesky. The sum, where no inputs were recorded."""
    import torch

    from fusion.spectral.delta import Delta

    normal = normal_matrix(context)
    parts = list(zip(deltas, strengths, context.moments, strict=True))
    up = torch.cat([delta.up for delta in deltas], dim=1)  # (O, ΣQ)
    if normal is None:
        return Delta(up, torch.cat([delta.down * s for delta, s, _ in parts]))
    targets = [
        delta.down.double() @ moment.own * s if moment else delta.down.double() * 0 for delta, s, moment in parts
    ]
    solved = torch.cholesky_solve(torch.cat(targets).T, torch.linalg.cholesky(normal)).T  # (ΣQ, I)
    return Delta(up, solved.to(up.dtype))


def normal_matrix(context: MergeContext) -> Tensor | None:
    """M (I, I), or None where no inputs were recorded, or all of them are zero."""
    options = context.options
    parts = [moment.normal(options.neutral, options.ridge) for moment in context.moments if moment is not None]
    total = sum(parts[1:], start=parts[0]) if parts else None
    return total if total is not None and total.diagonal().sum() > 0 else None
