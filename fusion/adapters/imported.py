"""Layers of other programs' adapters, kept in the factors of their writer: applied and exported, never trained here.

The change may have full rank, so ΔW is made only when it is asked for, layer by layer. Any kind may be decomposed as by
DoRA (Liu et al. 2024, arXiv 2402.09353): `dora_scale` m replaces the norm of each output's (or input's) weights,

    W' = m ∘ (W + ΔV) / ‖W + ΔV‖        ΔW = (m/‖W + ΔV‖ − 1) ∘ W + m/‖W + ΔV‖ ∘ ΔV

with ΔV what the other factors give. So ΔW depends on the weight W of the base, which `on` provides.

Shapes: O out_features, I in_features, K cells of the kernel (1, or 9 of a 3x3 convolution), Q rank.
"""

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from fusion.adapters.layer import AdapterLayer, LayerOptions
from fusion.errors import BaseMismatch, ConfigError
from fusion.spectral.delta import Delta
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum


class ImportedLayer(AdapterLayer):
    """A layer in the factors of its writer; a kind names them, and says what they mean."""

    slice_of = None
    factors: ClassVar[tuple[str, ...]]  # all tensors that the kind can have, without those that every kind can have
    alpha: Tensor  # the scale of ΔV is alpha / Q
    dora_scale: Tensor | None  # (O, 1), or (1, I) of older files

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in self.factors:
            self.register_parameter(name, nn.Parameter(tensors[name]) if name in tensors else None)
        self.register_buffer("alpha", tensors["alpha"])
        self.register_buffer("dora_scale", tensors.get("dora_scale"))
        self._weight: Tensor | None = None
        self.sizes({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every tensor that a layer can have."""
        return (*cls.factors, "alpha", "dora_scale")

    @classmethod
    def sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """The shape (O, I·K) of ΔW, by the shapes of the factors.

        Raises KeyError for a tensor that is missing, ValueError for shapes that do not fit each other.
        """
        if shapes["alpha"] != ():
            raise ValueError(f"alpha has shape {shapes['alpha']}, but is one number")
        size = cls.factor_sizes(shapes)
        scale = shapes.get("dora_scale", (size[0], 1))
        if len(scale) != 2 or (scale != (size[0], 1) and (scale[0] != 1 or size[1] % max(scale[1], 1))):
            raise ValueError(f"dora_scale has shape {scale}, which does not fit {size}")
        return size

    @classmethod
    @abstractmethod
    def factor_sizes(cls, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """`sizes`, by the kind's own factors."""

    @abstractmethod
    def change(self) -> Delta:
        """ΔV, or ΔW where there is no `dora_scale`."""

    @classmethod
    def fresh(
        cls,
        weight: Tensor,
        directions: SpectralSlice,
        *,
        spectrum: Spectrum | None = None,
        options: LayerOptions = LayerOptions(),
    ) -> Self:
        raise ConfigError("Adapters of this type are imported from files of other programs; they cannot be trained.")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors)

    @property
    def shape(self) -> tuple[int, int]:
        return self.sizes({name: tuple(tensor.shape) for name, tensor in self.state_dict().items()})

    @property
    def needs_base(self) -> bool:
        return self.dora_scale is not None and self._weight is None

    def on(self, weight: Tensor) -> Self:
        if not self.needs_base:
            return self
        layer = copy.copy(self)
        layer._weight = weight
        return layer

    def delta(self) -> Delta:
        """Raises BaseMismatch where ΔW depends on the base's weight and `on` has not provided it."""
        change = self.change()
        if self.dora_scale is None:
            return change
        if self._weight is None:
            raise BaseMismatch("The change of a DoRA depends on the weights of its base: name it with --base (pipe=).")
        groups = max(self.dora_scale.shape[1], 1)  # 1 for the norms of outputs, I for those of inputs
        dense, weight = (w.unflatten(1, (groups, -1)) for w in (change.dense(), self._weight.to(change.up)))
        norm = torch.linalg.vector_norm(weight + dense, dim=(1, 2) if groups == 1 else (0, 2), keepdim=True)
        gain = self.dora_scale.to(norm)[..., None] / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return Delta.from_dense(((gain - 1) * weight + gain * dense).flatten(1))


def factored(up: Tensor, down: Tensor) -> Delta:
    """ΔW = up · down; as one dense matrix where the factors would be larger."""
    delta = Delta(up, down)
    return delta if delta.rank <= min(delta.shape) else Delta.from_dense(delta.dense())


def check_rank(shapes: Mapping[str, tuple[int, ...]], up: str, down: str) -> None:
    """Raise ValueError where `up` (O, Q) and `down` (Q, I·K) share no rank."""
    if not len(shapes[up]) == len(shapes[down]) == 2 or shapes[up][1] != shapes[down][0]:
        raise ValueError(f"{up} has shape {shapes[up]} and {down} {shapes[down]}, which share no rank")
