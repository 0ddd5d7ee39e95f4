"""Distillation: one plain, ungated LoRA learns what gated adapters do, by gradient descent on what the UNet reads.

The UNet reads a prompt through the keys and values of its cross-attention, k = W h with h the prompt's encoded states.
The teacher is the base with all adapters attached and gated, the student the base with one LoRA and embeddings of its
own. For every layer l and prompt p the student minimises

    ‖k'ₗ − kₗ‖² / sₗₚ,    k' − k = W (h' − h) + up (down h') − g

with g what the teacher's gated branches add at the rows of their tokens. sₗ of a concept is the mean square by which
the concept changes k in layer l; a prompt's s is the mean of its concepts', and the median of all where it has none.
So an error of 1 is as large as a concept.

After Mix-of-Show's gradient fusion (Gu et al. 2023, arXiv 2305.18292), which fits each layer's merged weight to what
each adapter does on the inputs of its own prompts. Here the teacher is the gated set, so that prompts of several
concepts and of none have right answers, too; the text encoder is learned with the keys and values, end to end; and
prompts are drawn from a distribution.

Shapes: B prompts, T text positions, I width of the states, O out_features, Q rank, N rows with gated changes,
L layers, C concepts.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.spectral.delta import Delta

# Concepts that hardly change a layer count as if they changed it by this share of the mean.
LEAST_SCALE = 0.05
# ρ of least squares, as a share of the mean square of the inputs.
RIDGE = 1e-3


def layer_errors(
    weight: Tensor, delta: Delta, states: Tensor, target_states: Tensor, rows: Tensor, gated: Tensor
) -> Tensor:
    """The mean squares (B,) of k' − k in one layer.

    `weight` (O, I) of the base, `delta` of the student; `states` (B, T, I) of the student, `target_states` of the
    teacher, whose gated branches add `gated` (N, O) at the flattened `rows` (N,).
    """
    from torch.nn.functional import linear

    error = linear(states - target_states, weight) + linear(linear(states, delta.down), delta.up)  # (B, T, O)
    error = error.float().flatten(0, 1).index_add(0, rows, gated.float(), alpha=-1).view(error.shape)
    return error.square().mean(dim=(1, 2))


def gated_change(branches: Delta, owners: Tensor, states: Tensor, acts: Tensor) -> Tensor:
    """What gated branches add to rows of one layer, (N, O).

    `branches`: all of them as one ΔW, whose column q of `up` belongs to branch `owners[q]`; `states` (N, I); `acts`
    (N, branches) is 1 where a branch acts on a row.
    """
    from torch.nn.functional import linear

    return linear(linear(states, branches.down) * acts[:, owners], branches.up)


def ridge_factor(second: Tensor) -> Tensor:
    """L, lower triangular in float64, with L Lᵀ = `second` + ρ 1; for the second moments Σ w x xᵀ (I, I) of inputs."""
    import torch

    normal = second.cpu().double()
    normal.diagonal().add_(RIDGE * float(normal.diagonal().mean()) + torch.finfo(torch.float64).tiny)
    return torch.linalg.cholesky(normal)


def least_squares_delta(up: Tensor, cross: Tensor, factor: Tensor, rank: int) -> Delta:
    """The ungated ΔW of at most `rank` that is closest to what gated branches add to one layer's inputs x:

        Σ w ‖ΔW x − up (a ⊙ down x)‖² + ρ ‖ΔW‖²

    with w the weight of an input, and a (Q,) 1 where the branch of a column of `up` (O, Q) acts. Reduced-rank
    regression (Izenman 1975) from `cross` Σ w x (a ⊙ down x)ᵀ (I, Q) and the `factor` L (I, I) of the inputs, by
    `ridge_factor`: the best ΔW of any rank is up crossᵀ (L Lᵀ)⁻¹, and that of a rank the truncated SVD of
    up crossᵀ L⁻ᵀ, times L⁻¹. In float64.
    """
    import torch

    from fusion.spectral.delta import Delta

    whitened = torch.linalg.solve_triangular(factor, cross.cpu().double(), upper=False).T  # (Q, I)
    best = Delta(up.cpu().double(), whitened).compress(rank)
    down = torch.linalg.solve_triangular(factor, best.down, upper=False, left=False)
    return Delta(best.up, down).to(up.device, torch.float32)


def prompt_scales(scales: Tensor, presence: Tensor, free_weight: float = 1.0) -> Tensor:
    """sₗₚ (B, L) from the scales (C, L) of the concepts, and which of them each prompt holds, `presence` (B, C).

    Prompts without a concept weigh `free_weight` times as much.
    """
    scales = scales.maximum(scales.mean(dim=0) * LEAST_SCALE)
    median = scales.sort(dim=0).values[len(scales) // 2]  # (L,)
    counts = presence.sum(dim=1, keepdim=True)  # (B, 1)
    return (presence @ scales / counts.clamp(min=1)).where(counts > 0, median / free_weight)


def distillation_loss(errors: Sequence[Tensor], scales: Tensor) -> Tensor:
    """The mean over prompts and layers of the layers' errors, (B,) each, in units of `scales` (B, L)."""
    import torch

    return (torch.stack(list(errors), dim=1) / scales).mean()
