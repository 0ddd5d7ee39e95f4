"""ΔW = Σ strengthᵢ trim(ΔWᵢ): only the share `density` of largest magnitude of every change takes part.

Number by number, dense in float32, one layer at a time. The result has full rank and is kept exactly: as large as the
weight itself, unless fuse(…, rank= or energy=) compresses it.
"""

from collections.abc import Sequence

import torch

from fusion.methods.dense import taking_part, trimmed, whole_delta
from fusion.methods.method import MergeContext
from fusion.spectral.delta import Delta


def merge(deltas: Sequence[Delta], strengths: Sequence[float], given: MergeContext) -> Delta:
    """Where nothing takes part, no change."""
    parts = [trimmed(delta.dense().float(), given.options.density) for delta in taking_part(deltas, strengths)]
    return whole_delta(torch.stack(parts).sum(dim=0)) if parts else Delta.zero(*deltas[0].shape)
