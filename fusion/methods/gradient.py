"""Gradient fusion as Mix-of-Show does it (Gu et al. 2023, arXiv 2305.18292): what `regression` solves, by LBFGS.

On the same second moments, from no change, with the original's settings (500 iterations, history 25, strong Wolfe). The
reference that `regression` has to match, and far slower. The optimised matrix is dense, in float64, one layer at a
time; the result is kept exactly, of rank min(O, I).

Shapes: O out_features, I in_features.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion.methods.regression import merge as solve
from fusion.methods.regression import normal_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.methods.method import MergeContext
    from fusion.spectral.delta import Delta

HISTORY = 25


def merge(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    """Where no inputs were recorded there is nothing to descend on, and this is regression's result."""
    import torch

    normal = normal_matrix(context)
    if normal is None:
        return solve(deltas, strengths, context)
    parts = zip(deltas, strengths, context.moments, strict=True)
    targets = [delta.up.double() @ (delta.down.double() @ moment.own) * s for delta, s, moment in parts if moment]
    scale = normal.diagonal().mean()
    change = _descend(normal / scale, torch.stack(targets).sum(dim=0) / scale, context.options.iterations)
    return type(deltas[0]).from_dense(change.to(deltas[0].up.dtype))


def _descend(normal: Tensor, target: Tensor, iterations: int) -> Tensor:
    """The minimum (O, I) of ½ tr(ΔW M ΔWᵀ) − tr(ΔW Kᵀ) for M = `normal` (I, I) and K = `target` (O, I)."""
    import torch

    change = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change],
        max_iter=iterations,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-16,
        tolerance_change=1e-16,
    )

    def objective() -> Tensor:
        with torch.no_grad():
            product = change @ normal
            change.grad = product - target
            return (change * (product / 2 - target)).sum()

    optimizer.step(objective)
    return change.detach()
