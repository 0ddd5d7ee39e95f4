"""Spectral Adapter^R (Zhang & Pilanci 2024, arXiv 2405.13952): rotate the singular vectors of one slice."""

import torch
from torch import Tensor

from fusion.adapters.layer import SpectralLayer, zeros
from fusion.spectral.delta import Delta
from fusion.spectral.rotation import cayley_offset
from fusion.spectral.spectrum import Spectrum


class RotationalLayer(SpectralLayer):
    """W' = (U R_U) diag(S') (V R_V)ᵀ on one slice, S' = S (1 + dc), R_U and R_V rotations by the Cayley map.

    ΔW = U M Vᵀ with M = R_U S' R_Vᵀ − S. Expanded in E = R − I so that nothing cancels:

        M = S dc + E_U S' + S' E_Vᵀ + E_U S' E_Vᵀ        rank ≤ R, exactly 0 when untrained

    ΔW stays in span(U) ⊗ span(V): two of these on disjoint slices have inner product 0.
    """

    def __init__(self, basis: Spectrum) -> None:
        super().__init__(basis)
        rank = basis.S.shape[0]
        self.X_U = zeros(rank, rank, like=basis.S)  # (R, R), only its skew part counts
        self.X_V = zeros(rank, rank, like=basis.S)  # (R, R)
        self.dc = zeros(rank, like=basis.S)  # (R,), the official code's c is 1 + dc

    def delta(self) -> Delta:
        basis = self.basis.spectrum()
        E_U, E_V = cayley_offset(self.X_U), cayley_offset(self.X_V)  # (R, R), float32 or better
        scaled = (basis.S * (1 + self.dc)).to(E_U.dtype)  # (R,)
        turned = E_U * scaled[..., None, :]  # E_U S', (R, R)
        diagonal = torch.diag_embed(basis.S * self.dc).to(E_U.dtype)
        M = diagonal + turned + scaled[..., None] * E_V.mT + turned @ E_V.mT
        return Delta(basis.U, M.to(basis.V.dtype) @ basis.V.mT)

    def learning_rate_gains(self, reference: Tensor) -> dict[str, float]:
        # X and the relative dc all act through σ.
        return {name: self.gain(reference) for name, _ in self.named_parameters()}
