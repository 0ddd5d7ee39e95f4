"""Methods that are defined number by number: changes as dense matrices in float32, one layer at a time.

ties               trim each change, elect a sign per number, average what agrees (Yadav et al. 2023, arXiv 2306.01708)
dare               drop numbers of each change at random, rescale the rest, add (Yu et al. 2023, arXiv 2311.03099)
magnitude_prune    trim each change, add

Trimming keeps the share `density` of largest magnitude. Adapters of strength 0 do not take part. The result has full
rank and is exact: as large as the weight itself, unless fuse(…, rank= or energy=) compresses it.

Shapes: O out_features, I in_features, N adapters that take part.
"""

from __future__ import annotations  # the table of methods loads no torch

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fusion.methods.method import MergeContext

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.spectral.delta import Delta


def ties(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    parts = [trimmed(delta.dense().float(), context.options.density) for delta in taking_part(deltas, strengths)]
    return _combined(elected_mean, parts, deltas[0])


def dare(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    parts = [_pruned(delta, context) * s for delta, s in zip(deltas, strengths, strict=True) if s]
    return _combined(_total, parts, deltas[0])


def magnitude_prune(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    parts = [trimmed(delta.dense().float(), context.options.density) for delta in taking_part(deltas, strengths)]
    return _combined(_total, parts, deltas[0])


def taking_part(deltas: Sequence[Delta], strengths: Sequence[float]) -> list[Delta]:
    """strengthᵢ ΔWᵢ of the adapters whose strength is not zero."""
    return [delta * strength for delta, strength in zip(deltas, strengths, strict=True) if strength]


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """The share `density` of largest magnitude, zeros elsewhere."""
    from peft.utils.merge_utils import prune

    return matrix if density == 1 else prune(matrix, density, method="magnitude")


def elected_mean(matrices: Sequence[Tensor]) -> Tensor:
    """TIES' election: number by number, the mean of those that have the sign of the sum."""
    import torch
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    stacked = torch.stack(list(matrices))  # (N, O, I)
    return disjoint_merge(stacked, calculate_majority_sign_mask(stacked))


def _total(matrices: Sequence[Tensor]) -> Tensor:
    return sum(matrices[1:], start=matrices[0])


def _pruned(delta: Delta, context: MergeContext) -> Tensor:
    """ΔW (O, I) with each number kept with probability `density`, and then divided by it.

    Seed, layer and the change itself decide which, so the order of adapters does not matter.
    """
    import torch
    from peft.utils.merge_utils import prune

    matrix, density = delta.dense().float().cpu(), context.options.density
    if density == 1:
        return matrix
    name = hashlib.sha256(f"{context.options.seed} {context.layer}".encode() + matrix.numpy().tobytes()).digest()
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(int.from_bytes(name[:7], "big"))
        return prune(matrix, density, method="random", rescale=True)


def _combined(combine: Callable[[Sequence[Tensor]], Tensor], matrices: Sequence[Tensor], like: Delta) -> Delta:
    """What `combine` makes of N matrices (O, I), exactly; where there are none, no change of the shape of `like`."""
    return type(like).from_dense(combine(matrices)) if matrices else like.zero(*like.shape)
