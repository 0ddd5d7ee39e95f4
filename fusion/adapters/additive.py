"""Spectral Adapter^A (Zhang & Pilanci 2024, arXiv 2405.13952): add to the singular vectors of one slice."""

import torch
from torch import Tensor

from fusion.adapters.layer import SpectralLayer, zeros
from fusion.spectral.delta import Delta
from fusion.spectral.spectrum import Spectrum


class AdditiveLayer(SpectralLayer):
    """W' = (U + dU)(S + dS)(V + dV)ᵀ on one slice.

    dU, dV are the paper's A_U, A_V; dS is the official code's `spectral_C`. Written so that nothing cancels, with
    S' = S + dS and V' = V + dV:

        ΔW = [dU  U] · [S' V'ᵀ ; S dVᵀ + dS V'ᵀ]        rank ≤ 2R, exactly 0 when untrained
    """

    def __init__(self, basis: Spectrum) -> None:
        super().__init__(basis)
        self.dU = zeros(*basis.U.shape, like=basis.U)  # (O, R)
        self.dS = zeros(*basis.S.shape, like=basis.S)  # (R,)
        self.dV = zeros(*basis.V.shape, like=basis.V)  # (I, R)

    def delta(self) -> Delta:
        return additive_delta(self.basis.spectrum(), self.dU, self.dS, self.dV)

    def learning_rate_gains(self, reference: Tensor) -> dict[str, float]:
        # ∂ΔW/∂dU and ∂ΔW/∂dV scale with σ, ∂ΔW/∂dS does not.
        gain = self.gain(reference)
        return {"dU": gain, "dS": 1.0, "dV": gain}


def additive_delta(basis: Spectrum, dU: Tensor, dS: Tensor, dV: Tensor) -> Delta:
    """ΔW = (U + dU)(S + dS)(V + dV)ᵀ − U S Vᵀ, in the form of the class docstring."""
    U, S, V = basis
    moved_V = (V + dV).mT  # (R, I)
    by_dU = (S + dS)[..., None] * moved_V  # (R, I)
    by_U = S[..., None] * dV.mT + dS[..., None] * moved_V  # (R, I)
    return Delta(torch.cat([dU, U], dim=-1), torch.cat([by_dU, by_U], dim=-2))
