"""ΔW = c Σ strengthᵢ ΔWᵢ with c so that ‖ΔW‖ = maxᵢ ‖strengthᵢ ΔWᵢ‖ over all layers together.

The sum changes the weights by no more than its largest part would: two orthogonal adapters of equal norm are scaled by
0.71 each, two aligned ones by 0.5 (the automatic strengths of ComfyUI's LoRA optimizers).

Shapes: N adapters.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def weights(strengths: Sequence[float], gram: Callable[[], Tensor]) -> Sequence[float]:
    """strengths · c. Where the sum is zero there is nothing to scale, and c is 1."""
    import torch

    s = torch.tensor(strengths, dtype=torch.float64)  # (N,)
    scaled = gram() * torch.outer(s, s)  # (N, N)
    whole, largest = scaled.sum(), scaled.diagonal().max()
    scale = float((largest / whole).sqrt()) if whole > 0 else 1.0
    return tuple(strength * scale for strength in strengths)
