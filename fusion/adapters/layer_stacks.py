"""ΔW of all layers of an adapter once a step: those of one type and shape in a few batched products.

On a GPU a training step is bound by the number of its kernels, and an adapter has hundreds of layers of few shapes.
Files, parameters and their names stay those of the single layers.

Shapes: L layers of a stack, O out_features, I in_features, Q rank of a delta.
"""

import copy
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call

from fusion.adapters.layer import AdapterLayer
from fusion.spectral.delta import Delta


class LayerStack:
    """Layers of one type and shape. Their buffers become views of one stacked tensor, so they take no more memory."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.layers = tuple(layers)
        # Never computed with: it only has the formula. Its tensors are replaced by the stacked ones.
        self._formula = copy.deepcopy(layers[0]).to("meta")
        self._parameters = {n: [layer.get_parameter(n) for layer in layers] for n, _ in layers[0].named_parameters()}
        self._buffers = {
            name: _shared([layer.get_buffer(name) for layer in layers]) for name, _ in layers[0].named_buffers()
        }

    def delta(self) -> Delta:
        """ΔW of all layers: up (L, O, Q) and down (L, Q, I)."""
        parameters = {name: torch.stack([*tensors]) for name, tensors in self._parameters.items()}
        return functional_call(self._formula, parameters | self._buffers, ())


class LayerStacks:
    """All layers of an adapter that is trained, stacked by type and shape."""

    def __init__(self, layers: Iterable[AdapterLayer]) -> None:
        alike: dict[object, list[AdapterLayer]] = {}
        for layer in layers:
            alike.setdefault(_form(layer), []).append(layer)
        self.stacks = [LayerStack(group) for group in alike.values()]
        self._stacked: list[Delta] = []
        self._deltas: dict[AdapterLayer, Delta] = {}

    def delta(self, layer: AdapterLayer) -> Delta:
        """ΔW of one layer: in a step its part of what is computed for all, else by the layer alone."""
        return self._deltas.get(layer) or layer.delta()

    @property
    def stacked(self) -> Sequence[Delta]:
        """ΔW of every stack, in a step."""
        return self._stacked

    @contextmanager
    def computed(self) -> Generator[None]:
        """For the block, which has one forward and one backward pass, ΔW of all layers as their parameters are now."""
        self._stacked = [stack.delta() for stack in self.stacks]
        self._deltas = {
            layer: Delta(up, down)
            for stack, delta in zip(self.stacks, self._stacked, strict=True)
            for layer, up, down in zip(stack.layers, delta.up.unbind(), delta.down.unbind(), strict=True)
        }
        try:
            yield
        finally:
            self._stacked, self._deltas = [], {}


def _form(layer: AdapterLayer) -> object:
    tensors: list[tuple[str, Tensor]] = [*layer.named_parameters(), *layer.named_buffers()]
    return type(layer), tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors)


def _shared(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors, stacked; each becomes a view of the result."""
    stacked = torch.stack(list(tensors))
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    return stacked
