"""ΔW = c Σ strengthᵢ ΔWᵢ with c so that ‖ΔW‖ = maxᵢ ‖strengthᵢ ΔWᵢ‖ over all layers together.

The sum cooks the weights no harder than its strongest part would: two orthogonal adapters of equal norm arrive at 0.71
each, two aligned ones at 0.5 (the automatic strengths of ComfyUI's LoRA optimizers).

Shapes: N adapters.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def weights(strengths: Sequence[float], gram: Callable[[], Tensor]) -> Sequence[float]:
    """strengths · c. Where the sum is zero there is nothing to scale, and c is 1."""
    s = torch.tensor(strengths, dtype=torch.float64)  # (N,)
    scaled = gram() * torch.outer(s, s)  # (N, N)
    whole, strongest = scaled.sum(), scaled.diagonal().max()
    scale = float((strongest / whole).sqrt()) if whole > 0 else 1.0
    return tuple(strength * scale for strength in strengths)
