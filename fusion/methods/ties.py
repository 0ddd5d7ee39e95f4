"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim each change, elect a sign per number, average what agrees.

Number by number on strengthᵢ ΔWᵢ, dense in float32, one layer at a time. The result has full rank and is kept exactly:
as large as the weight itself, unless fuse(…, rank= or energy=) compresses it.
"""

from collections.abc import Sequence

from fusion.methods.dense import elected_mean, taking_part, trimmed, whole_delta
from fusion.methods.method import MergeContext
from fusion.spectral.delta import Delta


def merge(deltas: Sequence[Delta], strengths: Sequence[float], given: MergeContext) -> Delta:
    """Where nothing takes part, no change."""
    parts = [trimmed(delta.dense().float(), given.options.density) for delta in taking_part(deltas, strengths)]
    return whole_delta(elected_mean(parts)) if parts else Delta.zero(*deltas[0].shape)
