"""The leading singular directions of one weight, in seconds at the size of language models.

Shapes: O out_features, I in_features, K directions.
"""

import logging

import torch
from torch import Tensor

from fusion.library.spectrum_cache import cached_spectrum
from fusion.spectral.spectrum import Spectrum, residual

logger = logging.getLogger(__name__)

FULL_SVD = 1024  # up to this min(O, I) the whole SVD takes about a second, and is cached on the disk
LOW_RANK_TOLERANCE = 1e-3  # largest residual of a randomised SVD; the same base, half precision, has up to 1e-4 anyway
# Directions beyond K and power iterations. Four matrices of 2048² with K = 64, one thread of a CPU: spectra that fall
# like i^-0.5 or faster have a residual of 2e-4 after the first, i^-0.2 of 6e-5 after the second, in 0.8 and 2.4 s;
# Gaussian noise, which falls slowest, of 2.4e-3, and then takes the whole SVD (8 s).
_ATTEMPTS = ((64, 8), (128, 16))


def leading_directions(weight: Tensor, depth: int) -> Spectrum:
    """The first `depth` directions of `weight` (O, I), or all if there are fewer, in float32 on its device.

    The whole SVD of small weights, from the cache of spectra. Of large ones a randomised SVD (Halko et al. 2011,
    arXiv 0909.4061) whose residual is measured, and the whole SVD where that is above LOW_RANK_TOLERANCE. On a GPU
    where there is one.
    """
    narrow = min(weight.shape)
    if narrow <= FULL_SVD:
        return cached_spectrum(weight, depth)
    matrix = weight.detach().float()
    if matrix.device.type == "cpu" and torch.cuda.is_available():
        matrix = matrix.cuda()
    for oversampling, iterations in _ATTEMPTS:
        if 2 * (depth + oversampling) > narrow:
            break
        spectrum = _randomised(matrix, depth, oversampling, iterations)
        error = residual(matrix, spectrum)
        if error <= LOW_RANK_TOLERANCE:
            return Spectrum(*(part.to(weight.device) for part in spectrum))
        logger.info("A randomised SVD of %s has residual %.1e.", tuple(weight.shape), error)
    return Spectrum(*(part.to(weight.device) for part in cached_spectrum(matrix, depth)))


def _randomised(matrix: Tensor, depth: int, oversampling: int, iterations: int) -> Spectrum:
    """The same numbers in every process on one kind of device; the sign of each direction as `decompose` has it."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=depth + oversampling, niter=iterations)
    U, S, V = U[:, :depth], S[:depth], V[:, :depth]
    sign = torch.sign(U.gather(0, U.abs().argmax(dim=0, keepdim=True))).squeeze(0)  # (K,)
    return Spectrum((U * sign).contiguous(), S.contiguous(), (V * sign).contiguous())
