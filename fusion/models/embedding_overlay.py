"""Concepts' own embeddings in place of those of the words that stand in for them.

Shapes: N prompts, T text positions, V rows of concepts, D embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def overlaid(embeddings: Tensor, concepts: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Embeddings (N, T, D) with rows (V × D) of concepts where `concepts` (N·T, V) has a 1. By a product, since the
    gradient of an index is summed in another order each time on a GPU.
    """
    if not rows or len(concepts) != embeddings.shape[:-1].numel():  # a call by other code, not by the text encoder
        return embeddings
    with torch.autocast(embeddings.device.type, enabled=False):
        overlay = concepts @ torch.stack(list(rows)).to(concepts)  # (N·T, D), exact: one row a position at most
    chosen = concepts.any(1).view(*embeddings.shape[:-1], 1)
    return torch.where(chosen, overlay.to(embeddings.dtype).view_as(embeddings), embeddings)
