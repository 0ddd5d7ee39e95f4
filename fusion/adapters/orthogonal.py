"""Orthogonal Adaptation (Po et al. 2024, arXiv 2312.02432): each concept has frozen input directions of its own."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from fusion.adapters.layer import AdapterLayer, LayerOptions, adopt, zeros
from fusion.spectral.delta import Delta
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum


class OrthogonalLayer(AdapterLayer):
    """ΔW = up · rowsᵀ with `rows` (I, R) a frozen block of one shared orthonormal basis of the input space.

    The basis depends on I alone, so adapters trained separately use blocks of the same one: on disjoint slices
    ΔW₁ ΔW₂ᵀ = 0 exactly.
    """

    slice_of = "shared basis"
    rows: Tensor

    def __init__(self, rows: Tensor, out_features: int) -> None:
        super().__init__()
        self.register_buffer("rows", rows)  # (I, R)
        self.up = zeros(out_features, rows.shape[1], like=rows)  # (O, R)

    @classmethod
    def fresh(
        cls,
        weight: Tensor,
        directions: SpectralSlice,
        *,
        spectrum: Spectrum | None = None,
        options: LayerOptions = LayerOptions(),
    ) -> Self:
        out_features, in_features = weight.shape
        directions.check_fits(in_features, "the shared basis")
        block = shared_basis(in_features)[:, list(directions.indices)]
        return cls(block.to(weight.device, torch.promote_types(weight.dtype, torch.float32)), out_features)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        layer = cls(tensors["rows"], tensors["up"].shape[0])
        adopt(layer, tensors)
        return layer

    def delta(self) -> Delta:
        return Delta(self.up, self.rows.mT)


@lru_cache(maxsize=8)
def shared_basis(size: int) -> Tensor:
    """A random orthonormal basis of R^size (size, size), the same in every process."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    Q, R = torch.linalg.qr(gaussian)
    return Q * R.diagonal().sign()  # a positive diagonal makes the QR unique
