"""Gradient fusion as Mix-of-Show does it (Gu et al. 2023, arXiv 2305.18292): what `regression` solves, by LBFGS.

On the same second moments, from no change, with the original's settings (500 iterations, history 25, strong Wolfe). The
reference that `regression` has to match, and far slower. The optimised matrix is dense, in float64, one layer at a
time; the result is kept exactly, of rank min(O, I).

Shapes: O out_features, I in_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.methods.dense import whole_delta
from fusion.methods.method import MergeContext
from fusion.methods.regression import merge as solve
from fusion.methods.regression import normal_matrix
from fusion.spectral.delta import Delta

HISTORY = 25


def merge(deltas: Sequence[Delta], strengths: Sequence[float], given: MergeContext) -> Delta:
    """Where no adapter has met an input there is nothing to descend on, and this is regression's answer."""
    normal = normal_matrix(given)
    if normal is None:
        return solve(deltas, strengths, given)
    parts = zip(deltas, strengths, given.moments, strict=True)
    wanted = [delta.up.double() @ (delta.down.double() @ moment.own) * s for delta, s, moment in parts if moment]
    scale = normal.diagonal().mean()
    found = _descend(normal / scale, torch.stack(wanted).sum(dim=0) / scale, given.options.iterations)
    return whole_delta(found.to(deltas[0].up.dtype))


def _descend(normal: Tensor, wanted: Tensor, iterations: int) -> Tensor:
    """The minimum (O, I) of ½ tr(ΔW M ΔWᵀ) − tr(ΔW Kᵀ) for M (I, I) and K (O, I)."""
    change = torch.zeros_like(wanted, requires_grad=True)
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
            pulled = change @ normal
            change.grad = pulled - wanted
            return (change * (pulled / 2 - wanted)).sum()

    optimizer.step(objective)
    return change.detach()
