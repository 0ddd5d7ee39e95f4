"""The contract of all adapter types: a trainable change to one frozen weight W (O, I).

Shapes: O out_features, I in_features, R slice length, K directions of a spectrum.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from fusion.spectral.delta import Delta
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum, decompose, take


@dataclass(frozen=True)
class LayerOptions:
    """Options of a fresh layer beside its weight and slice; each type reads its own."""

    seed: int = 0  # of random starts (lora)
    guard: int = 64  # guarded: leading directions of the base that are projected off, without the slice


class AdapterLayer(nn.Module, ABC):
    """A trainable change to one frozen weight W (O, I).

    Contract, tested for every entry of ADAPTERS:
      1. a fresh layer changes nothing: delta().dense() is exactly zero, in every dtype;
      2. every parameter is trainable, every buffer is saved;
      3. state_dict() is all that a file needs: from_tensors(state_dict()) has the same delta();
      4. delta() of a type that is trained works on stacked tensors, too: stacked equals single.
    """

    # What a slice index means for this type: two adapters can only collide if they mean the same.
    slice_of: ClassVar[str | None]  # "spectrum", "shared basis", or None: the type owns no directions

    @classmethod
    @abstractmethod
    def fresh(
        cls,
        weight: Tensor,
        directions: SpectralSlice,
        *,
        spectrum: Spectrum | None = None,
        options: LayerOptions = LayerOptions(),
    ) -> Self:
        """An untrained layer for `weight`; `spectrum` saves the SVD when the caller has it."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The layer whose state_dict() these are. Raises KeyError on a missing tensor."""

    @abstractmethod
    def delta(self) -> Delta:
        """ΔW in factors, differentiable in the parameters.

        The one formula of a type, for parameters and buffers that may have a leading dimension: the layers of a stack.
        """

    def forward(self) -> Delta:
        """ΔW, for torch.func.functional_call."""
        return self.delta()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Past nn.Module's: while a thread opens a model, accelerate.init_empty_weights makes that one drop the values
        # of all parameters, those of other threads too.
        self._parameters[name] = param

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight."""
        return self.delta().shape

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on the base's weight, and that is not known yet."""
        return False

    def on(self, weight: Tensor) -> Self:
        """The layer for a base whose weight is `weight` (O, I); itself where ΔW does not depend on it."""
        return self

    def learning_rate_gains(self, reference: Tensor) -> dict[str, float]:
        """Factors of the learning rate that make a slice learn as fast as the head of the spectrum, by parameter.

        `reference`: the base's largest singular values, as many as the slice is long. 1 where ∂ΔW does not depend on σ.
        """
        return {name: 1.0 for name, _ in self.named_parameters()}

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers. nn.Module's own iterators make a name for each, which takes ten times as long."""
        modules, tensors = list[nn.Module]([self]), list[Tensor]()
        for module in modules:
            tensors += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
            modules += [child for child in module._modules.values() if child is not None]
        return tensors


class Basis(nn.Module):
    """The frozen spectrum of an adapter's slice, stored in its file: U (O, R), S (R,), V (I, R)."""

    U: Tensor
    S: Tensor
    V: Tensor

    def __init__(self, spectrum: Spectrum) -> None:
        super().__init__()
        for name, tensor in zip(Spectrum._fields, spectrum, strict=True):
            self.register_buffer(name, tensor.detach())

    def spectrum(self) -> Spectrum:
        return Spectrum(self.U, self.S, self.V)


class SpectralLayer(AdapterLayer):
    """A layer that works on a slice of its weight's spectrum. Subclasses add parameters, zero at the start."""

    slice_of = "spectrum"

    def __init__(self, basis: Spectrum) -> None:
        super().__init__()
        self.basis = Basis(basis)

    @classmethod
    def fresh(
        cls,
        weight: Tensor,
        directions: SpectralSlice,
        *,
        spectrum: Spectrum | None = None,
        options: LayerOptions = LayerOptions(),
    ) -> Self:
        return cls(take(spectrum or decompose(weight), directions))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        layer = cls(Spectrum(*(tensors[f"basis.{name}"] for name in Spectrum._fields)))
        adopt(layer, tensors)
        return layer

    def gain(self, reference: Tensor) -> float:
        """Root-mean-square σ of the head of the spectrum over that of this slice."""
        return float(reference.square().mean().sqrt() / self.basis.S.square().mean().sqrt().clamp(min=1e-12))


def adopt(layer: AdapterLayer, tensors: Mapping[str, Tensor]) -> None:
    """Make these tensors the layer's parameters, in the dtype they have."""
    for name, parameter in list(layer.named_parameters()):
        value = tensors[name]
        if value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
        layer.register_parameter(name, nn.Parameter(value))


def zeros(*shape: int, like: Tensor) -> nn.Parameter:
    """A trainable tensor of zeros on the device and in the dtype of `like`."""
    return nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype))
