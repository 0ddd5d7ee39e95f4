"""ΔW = Σ strengthᵢ trim(ΔWᵢ): only the share `density` of largest magnitude of every change takes part.

Number by number, dense in float32, one layer at a time. The result has full rank and is kept exactly: as large as the
weight itself, unless fuse(…, rank= or energy=) compresses it.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.methods.method import MergeContext
    from fusion.spectral.delta import Delta


def merge(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    from fusion.methods.dense import combined, taking_part, total, trimmed

    parts = [trimmed(delta.dense().float(), context.options.density) for delta in taking_part(deltas, strengths)]
    return combined(total, parts, deltas[0].shape)
