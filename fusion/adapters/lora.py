"""LoRA (Hu et al. 2021, arXiv 2106.09685): the baseline, and the type of merged and imported adapters."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from fusion.adapters.layer import AdapterLayer, LayerOptions
from fusion.spectral.delta import Delta
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum


class LoraLayer(AdapterLayer):
    """ΔW = up · down, up zero at the start, down Gaussian of variance 1/I. Scale is always 1 (alpha = rank)."""

    slice_of = None

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"up {tuple(up.shape)} and down {tuple(down.shape)} do not share a rank")
        self.up = nn.Parameter(up)  # (O, Q)
        self.down = nn.Parameter(down)  # (Q, I)

    @classmethod
    def fresh(
        cls,
        weight: Tensor,
        directions: SpectralSlice,
        *,
        spectrum: Spectrum | None = None,
        options: LayerOptions = LayerOptions(),
    ) -> Self:
        """Only the rank of `directions` counts; `down` is drawn on the CPU, so that it is the same on every device."""
        out_features, in_features = weight.shape
        generator = torch.Generator().manual_seed(options.seed)
        down = torch.randn(directions.rank, in_features, generator=generator) / in_features**0.5
        exact = torch.promote_types(weight.dtype, torch.float32)
        up = torch.zeros(out_features, directions.rank)
        return cls(up.to(weight.device, exact), down.to(weight.device, exact))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["up"], tensors["down"])

    def delta(self) -> Delta:
        return Delta(self.up, self.down)
