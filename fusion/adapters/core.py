"""A free core between frozen singular vectors: LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604) on one slice."""

from fusion.adapters.layer import SpectralLayer, zeros
from fusion.spectral.delta import Delta
from fusion.spectral.spectrum import Spectrum


class CoreLayer(SpectralLayer):
    """ΔW = U M Vᵀ with M (R, R) free and 0 at the start. Disjoint slices have inner product 0."""

    def __init__(self, basis: Spectrum) -> None:
        super().__init__(basis)
        rank = basis.S.shape[0]
        self.M = zeros(rank, rank, like=basis.S)  # (R, R)

    def delta(self) -> Delta:
        return Delta(self.basis.U, self.M @ self.basis.V.T)
