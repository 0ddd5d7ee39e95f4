"""DARE (Yu et al. 2023, arXiv 2311.03099): drop numbers of each change at random, rescale the rest, add.

Number by number, dense in float32, one layer at a time. The result has full rank and is kept exactly: as large as the
weight itself, unless fuse(…, rank= or energy=) compresses it. What is dropped is a function of the seed, the layer and
the change itself, so the order of adapters does not matter; one adapter twice is dropped at the same places.
"""

from __future__ import annotations  # the table of methods loads no torch

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.methods.method import MergeContext
    from fusion.spectral.delta import Delta


def merge(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    from fusion.methods.dense import combined, total

    parts = [_pruned(delta, context) * s for delta, s in zip(deltas, strengths, strict=True) if s]
    return combined(total, parts, deltas[0].shape)


def _pruned(delta: Delta, context: MergeContext) -> Tensor:
    """ΔW (O, I) with each number kept with probability `density`, and then divided by it."""
    import torch
    from peft.utils.merge_utils import prune

    matrix, density = delta.dense().float().cpu(), context.options.density
    if density == 1:
        return matrix
    name = hashlib.sha256(f"{context.options.seed} {context.layer}".encode() + matrix.numpy().tobytes()).digest()
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(int.from_bytes(name[:7], "big"))
        return prune(matrix, density, method="random", rescale=True)
