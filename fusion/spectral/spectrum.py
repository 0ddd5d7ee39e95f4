"""The singular directions of one weight: W = U diag(S) Vᵀ.

Shapes: O out_features, I in_features, K directions, largest first.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusion.spectral.slices import SpectralSlice


class Spectrum(NamedTuple):
    """Some singular directions of a weight (O, I); column i belongs to the i-th of them."""

    U: Tensor  # (O, K) orthonormal columns
    S: Tensor  # (K,) descending, >= 0
    V: Tensor  # (I, K) orthonormal columns: V, never its transpose


def decompose(weight: Tensor, depth: int | None = None) -> Spectrum:
    """The first `depth` directions of `weight` (O, I), all of them by default, in float32 or better.

    A full SVD, because randomised ones get slices in the middle of slowly decaying spectra wrong. Singular vectors
    are unique only up to sign: each uᵢ gets the sign that makes its entry of largest magnitude positive, so that
    repeated calls agree. Different hardware may still differ, which is why adapters store their basis.
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    largest = U.abs().argmax(dim=0, keepdim=True)  # (1, K)
    sign = torch.sign(U.gather(0, largest)).squeeze(0)  # (K,), never 0: a unit vector has a non-zero entry
    first = slice(0, depth)
    U, S, V = (U * sign)[:, first], S[first], (Vh.T * sign)[:, first]
    return Spectrum(U.contiguous(), S.contiguous(), V.contiguous())


def take(spectrum: Spectrum, directions: SpectralSlice) -> Spectrum:
    """The basis of a slice: U (O, R), S (R,), V (I, R), copied.

    Raises SliceConflict (from the slice) if the spectrum is too short for it.
    """
    directions.check_fits(spectrum.S.shape[0])
    index = torch.tensor(directions.indices, device=spectrum.S.device)
    return Spectrum(*(t.index_select(-1, index).contiguous() for t in spectrum))


def residual(weight: Tensor, basis: Spectrum) -> float:
    """‖W V − U diag(S)‖ / ‖S‖: 0 if `basis` consists of singular directions of `weight`, 1 to √2 for an unrelated one.

    About 1e-4 after a float16 round trip, 5e-3 for 1 % weight noise, 5e-2 for 10 %. Far down the spectrum σ is smaller
    than such noise, so ‖S‖ counts for no less than an average slice has, √(R/I) ‖W‖. Infinite for other shapes and for
    values that are not finite.
    """
    W = weight.detach().to(basis.V.device, basis.V.dtype)
    if W.shape != (basis.U.shape[0], basis.V.shape[0]):
        return float("inf")
    average = torch.linalg.norm(W) * (basis.V.shape[1] / basis.V.shape[0]) ** 0.5
    scale = torch.maximum(torch.linalg.norm(basis.S), average).clamp(min=torch.finfo(W.dtype).tiny)
    distance = torch.linalg.norm(W @ basis.V - basis.U * basis.S) / scale
    return float(distance.nan_to_num(nan=float("inf"), posinf=float("inf")))
