"""Singular directions on disk: one SVD per weight, however many concepts are trained on it.

A file per weight, named by the SHA-256 of its shape, dtype and bits: a fine-tuned base has another spectrum.
U and V are stored direction by direction, so that the first directions are one run of bytes, and no more is read.

Shapes: O out_features, I in_features, K directions.
"""

import hashlib
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from fusion.adapters.adapter import content
from fusion.errors import FormatError
from fusion.formats.safetensors_file import opened, write_file
from fusion.spectral.spectrum import Spectrum, decompose, residual

logger = logging.getLogger(__name__)

MIN_DIRECTIONS = 128  # that are stored: 16 slices of 8
_RESIDUAL_TOLERANCE = 1e-3  # ‖W V − U S‖ relative to ‖S‖, which is about 1e-6 for a decomposition in float32
_LENGTH_TOLERANCE = 1e-3  # no singular vector in float32 has a length further from 1


def cache_folder() -> Path:
    """$FUSION_CACHE/spectra, or ~/.cache/spectral-fusion/spectra."""
    root = os.environ.get("FUSION_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "spectral-fusion") / "spectra"


def cached_spectrum(weight: Tensor, depth: int, folder: Path | None = None) -> Spectrum:
    """The first `depth` directions of `weight` (O, I), or all if there are fewer, in float32 on its device.

    Read from the cache if they are there; else decomposed and stored. A damaged file is replaced, a cache that cannot
    be written is not used, both with a warning.
    """
    size = min(depth, *weight.shape)
    path = (folder or cache_folder()) / f"{hashlib.sha256(content(weight)).hexdigest()}.safetensors"
    spectrum = _read(path, weight, size) if path.exists() else None
    if spectrum is None:
        whole = decompose(weight, max(depth, MIN_DIRECTIONS))
        try:
            write_file(path, {"U": whole.U.T, "S": whole.S, "V": whole.V.T}, {}, "float32")
        except FormatError as error:
            logger.warning("The spectrum cache cannot be used, every training will decompose the base again: %s", error)
        spectrum = Spectrum(whole.U[:, :size], whole.S[:size], whole.V[:, :size])
    return Spectrum(*(part.to(weight.device, torch.float32).contiguous() for part in spectrum))


def _read(path: Path, weight: Tensor, size: int) -> Spectrum | None:
    """None if the file has too few directions, or is damaged."""
    try:
        with opened(path) as file:
            stored = file.shapes.get("S", (0,))[0]
            if file.shapes != {"U": (stored, weight.shape[0]), "S": (stored,), "V": (stored, weight.shape[1])}:
                raise FormatError(f"'{path}' is the spectrum of another weight.")
            if stored < size:
                return None
            U, S, V = (file.head(name, size) for name in Spectrum._fields)  # (K, O), (K,), (K, I)
        lengths = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in (U, V)])
        # Written so that NaN fails.
        units = (lengths - 1).abs().max() < _LENGTH_TOLERANCE
        exact = residual(weight, Spectrum(U.T, S, V.T)) < _RESIDUAL_TOLERANCE
        if not (units and exact and (S.diff() <= 0).all() and (S >= 0).all()):
            raise FormatError(f"'{path}' holds no singular directions of this weight.")
    except FormatError as error:
        logger.warning("A cached spectrum is damaged and is computed again: %s", error)
        return None
    return Spectrum(U.T, S, V.T)
