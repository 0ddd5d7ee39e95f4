"""The mathematics: tensors in, tensors out. Knows nothing of modules, models or files."""

from fusion.spectral import delta, interference, rotation, slices, spectrum

__all__ = ["delta", "interference", "rotation", "slices", "spectrum"]
