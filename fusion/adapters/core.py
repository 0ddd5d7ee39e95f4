"""A trained matrix, full or diagonal, between the frozen singular vectors of one slice.

On disjoint slices two of these have inner product 0.
"""

from fusion.adapters.layer import SpectralLayer, zeros
from fusion.spectral.delta import Delta
from fusion.spectral.spectrum import Spectrum


class CoreLayer(SpectralLayer):
    """LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604) on a slice: ΔW = U M Vᵀ with M (R, R), zero at the start."""

    def __init__(self, basis: Spectrum) -> None:
        super().__init__(basis)
        rank = basis.S.shape[0]
        self.M = zeros(rank, rank, like=basis.S)  # (R, R)

    def delta(self) -> Delta:
        return Delta(self.basis.U, self.M @ self.basis.V.mT)


class SingularValuesLayer(SpectralLayer):
    """SVDiff (Han et al. 2023, arXiv 2303.11305) on a slice: ΔW = U diag(dS) Vᵀ."""

    def __init__(self, basis: Spectrum) -> None:
        super().__init__(basis)
        self.dS = zeros(*basis.S.shape, like=basis.S)  # (R,)

    def delta(self) -> Delta:
        return Delta(self.basis.U * self.dS[..., None, :], self.basis.V.mT)
