"""Rotations of a slice by the Cayley map: R(X) = (I − K)(I + K)⁻¹ with K = ½(X − Xᵀ).

Shapes: R the slice length.
"""

import torch
from torch import Tensor


def cayley_offset(X: Tensor) -> Tensor:
    """R(X) − I = −2 K (I + K)⁻¹ for X (…, R, R): exactly 0 at X = 0, and without cancellation near it.

    I + K is invertible for every skew K. Solved in float32 or better, since half precision has no solver.
    """
    exact = X.to(torch.promote_types(X.dtype, torch.float32))
    K = (exact - exact.mT) / 2  # (R, R)
    eye = torch.eye(K.shape[-1], device=K.device, dtype=K.dtype)
    # K and (I + K)⁻¹ commute, so solving (I + K) Y = K gives the same product; solve_ex does not wait for a GPU.
    solution, _ = torch.linalg.solve_ex(eye + K, K)
    return -2 * solution


def cayley(X: Tensor) -> Tensor:
    """The rotation itself, (R, R) orthogonal."""
    offset = cayley_offset(X)
    return offset + torch.eye(offset.shape[0], device=offset.device, dtype=offset.dtype)
