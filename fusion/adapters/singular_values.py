"""Only the singular values of one slice are trained: SVDiff (Han et al. 2023, arXiv 2303.11305) on a slice."""

from fusion.adapters.layer import SpectralLayer, zeros
from fusion.spectral.delta import Delta
from fusion.spectral.spectrum import Spectrum


class SingularValuesLayer(SpectralLayer):
    """ΔW = U diag(dS) Vᵀ. Disjoint slices have inner product 0."""

    def __init__(self, basis: Spectrum) -> None:
        super().__init__(basis)
        self.dS = zeros(*basis.S.shape, like=basis.S)  # (R,)

    def delta(self) -> Delta:
        return Delta(self.basis.U * self.dS, self.basis.V.T)
