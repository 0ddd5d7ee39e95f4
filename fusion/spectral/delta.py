"""The change to one weight, in factors: ΔW = up @ down.

Every adapter type produces Deltas; attaching, baking, fusion, metrics and export consume them.
Knows nothing of modules, models or files.

Shapes: O out_features, I in_features, Q rank of the change.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.errors import ConfigError


@dataclass(frozen=True)
class Delta:
    """ΔW (O, I) as a product; the linear algebra below never forms an (O, I) matrix, except `dense`."""

    up: Tensor  # (O, Q)
    down: Tensor  # (Q, I)

    @classmethod
    def zero(cls, out_features: int, in_features: int) -> "Delta":
        """No change: rank 0."""
        return cls(torch.zeros(out_features, 0), torch.zeros(0, in_features))

    @classmethod
    def from_dense(cls, matrix: Tensor) -> "Delta":
        """A matrix (O, I), exactly: one factor is the identity, so the rank is min(O, I).

        A power of two evens out the factors, which is exact and spares float16 files the loss of small numbers.
        """
        out_features, in_features = matrix.shape
        largest = float(matrix.detach().abs().max())
        even = 2.0 ** round(torch.tensor(largest).log2().item() / 2) if largest else 1.0
        if out_features <= in_features:
            return cls(torch.eye(out_features).to(matrix) * even, matrix / even)
        return cls(matrix / even, torch.eye(in_features).to(matrix) * even)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        return self.up @ self.down  # (O, I)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Delta":
        return Delta(self.up.to(device=device, dtype=dtype), self.down.to(device=device, dtype=dtype))

    def detach(self) -> "Delta":
        return Delta(self.up.detach(), self.down.detach())

    def __mul__(self, strength: float) -> "Delta":
        return self if strength == 1 else Delta(self.up * strength, self.down)

    def __add__(self, other: "Delta") -> "Delta":
        """Exact: the ranks add up. `compress` brings them down again."""
        return Delta(torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down], dim=0))

    def inner(self, other: "Delta") -> Tensor:
        """Frobenius inner product ⟨ΔW₁, ΔW₂⟩ = Σ (up₁ᵀ up₂) ∘ (down₁ down₂ᵀ), accumulated in float64."""
        left = self.up.double().T @ other.up.double()  # (Q₁, Q₂)
        right = self.down.double() @ other.down.double().T  # (Q₁, Q₂)
        return (left * right).sum()

    def norm(self) -> Tensor:
        """Frobenius norm ‖ΔW‖."""
        return self.inner(self).clamp(min=0).sqrt()

    def compress(self, rank: int | None = None, energy: float | None = None) -> "Delta":
        """The best approximation of at most `rank`, or of the least rank keeping the share `energy` of ‖ΔW‖².

        By the SVD of the factors alone: QR of both sides, then a (Q, Q) SVD (Eckart-Young). The singular values are
        split evenly over both factors.
        """
        if self.rank == 0:
            return self
        Q_up, R_up = torch.linalg.qr(self.up.double())  # (O, Q), (Q, Q)
        Q_down, R_down = torch.linalg.qr(self.down.double().T)  # (I, Q), (Q, Q)
        left, values, right = torch.linalg.svd(R_up @ R_down.T, full_matrices=False)
        size = values.shape[0] if rank is None else min(rank, values.shape[0])
        if energy is not None:
            share = values.square().cumsum(0) / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
            size = min(size, int((share < energy).sum()) + 1)
        root = values[:size].sqrt()
        up = (Q_up @ left[:, :size]) * root  # (O, size)
        down = root[:, None] * (Q_down @ right[:size].T).T  # (size, I)
        return Delta(up.to(self.up.dtype), down.to(self.down.dtype))


def check_compression(rank: int | None, energy: float | None) -> None:
    """Raise ConfigError for a rank or a share of energy that `compress` cannot have."""
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ConfigError(f"rank should be at least 1 and energy above 0 and at most 1, got {rank} and {energy}.")
