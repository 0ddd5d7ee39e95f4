"""KnOTS (Stoica et al. 2024, arXiv 2410.19735): merge in the directions that all changes share.

    [ΔW₁ … ΔWₙ] = U S [V₁ᵀ … Vₙᵀ],    ΔW = U · ties(S V₁ᵀ, …, S Vₙᵀ)

Never forms an (O, I) matrix: the SVD is that of the factors, and what is trimmed and elected are (K, I) coordinates,
with K ≤ ΣQ. The result is exact, of rank K.

Shapes: O out_features, I in_features, Q rank of a delta, K directions.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.methods.method import MergeContext
    from fusion.spectral.delta import Delta


def merge(deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
    """No change where no adapter takes part."""
    import torch

    from fusion.methods.dense import elected_mean, taking_part, trimmed
    from fusion.spectral.delta import Delta

    parts = [delta.to(dtype=torch.float64) for delta in taking_part(deltas, strengths)]
    if not any(delta.rank for delta in parts):
        return Delta.zero(*deltas[0].shape)
    Q, _ = torch.linalg.qr(torch.cat([delta.up for delta in parts], dim=1))  # (O, K)
    blocks = [(Q.T @ delta.up) @ delta.down for delta in parts]  # (K, I) each
    turn, _, _ = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)  # (K, K)
    coordinates = [trimmed(turn.T @ block, context.options.density) for block in blocks]
    dtype = deltas[0].up.dtype
    return Delta(Q @ turn, elected_mean(coordinates)).to(dtype=dtype)
