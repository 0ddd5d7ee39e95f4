"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim each change, elect a sign per number, average what agrees.

Number by number on strengthᵢ ΔWᵢ, dense in float32, one layer at a time. The result has full rank and is kept exactly:
as large as the weight itself, unless fuse(…, rank= or energy=) compresses it.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.methods.method import MergeContext
    from fusion.spectral.delta import Delta


def merge(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    from fusion.methods.dense import combined, elected_mean, taking_part, trimmed

    parts = [trimmed(delta.dense().float(), context.options.density) for delta in taking_part(deltas, strengths)]
    return combined(elected_mean, parts, deltas[0].shape)
