"""Layers with adapters attached: W x + Σ strength · up (down x), each branch behind its gate.

Shapes: O out_features, I in_features, Q rank of a delta, N rows of the input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.models.gates import Scope
from fusion.spectral.delta import Delta


@dataclass
class Strength:
    """A branch's strength, shared by all its layers and turned at run time."""

    value: float


@dataclass(frozen=True)
class Gate:
    """When a branch acts: where its tokens stand, or in the pictures, or regions, whose prompt holds them."""

    tokens: tuple[str, ...]
    scope: Callable[[], Scope]  # replaced at every call, so asked every time


class LayerBranch:
    """One branch on one layer: where its ΔW comes from, how strong, and its gate (None: always open)."""

    def __init__(self, source: Callable[[], Delta] | Delta, knob: Strength, gate: Gate | None) -> None:
        self.source, self.knob, self.gate = source, knob, gate
        self._cast: Delta | None = None  # fixed factors where they were used last; the source stays float32

    @property
    def fixed(self) -> bool:
        return isinstance(self.source, Delta)

    def factors(self, x: Tensor) -> Delta:
        """ΔW on the device and in the dtype of `x`."""
        if not isinstance(self.source, Delta):
            with torch.autocast(x.device.type, enabled=False):  # the maths stays in float32, the products need not
                return self.source().to(x.device, x.dtype)
        if self._cast is None or self._cast.up.device != x.device or self._cast.up.dtype != x.dtype:
            self._cast = self.source.to(x.device, x.dtype)
        return self._cast


class _Adapted:
    """What adapted linear layers and 1x1 convolutions share: the base module, and the branches by key."""

    base: nn.Module
    branches: dict[int, LayerBranch]
    _gates: list[tuple[LayerBranch, Gate]]
    _joined: tuple[tuple[object, ...], Delta] | None

    def start(self, base: nn.Module) -> None:
        # Past nn.Module's registry: state-dict keys, .parameters() and .to() stay those of the base layer.
        object.__setattr__(self, "base", base)
        self.branches, self._gates, self._joined = {}, [], None

    def add(self, key: int, branch: LayerBranch) -> None:
        self.branches[key] = branch
        self._changed()

    def remove(self, key: int) -> None:
        del self.branches[key]
        self._changed()

    def _changed(self) -> None:
        gates = [(b, b.gate) for b in self.branches.values() if b.gate is not None]
        # In one order whichever was attached first, so that sums round alike.
        self._gates[:] = sorted(gates, key=lambda pair: pair[1].tokens)
        if self._joined is not None:
            self._joined = None

    def open_delta(self, x: Tensor) -> tuple[Delta, float] | None:
        """All branches without a gate as one ΔW and the strength it still needs; None if nothing acts."""
        acting = [b for b in self.branches.values() if b.gate is None and b.knob.value != 0]
        if len(acting) <= 1:
            return (acting[0].factors(x), acting[0].knob.value) if acting else None
        if not all(branch.fixed for branch in acting):
            return _join([(b.factors(x), b.knob.value) for b in acting]), 1.0
        key = (x.device, x.dtype, tuple(b.knob.value for b in acting))
        if self._joined is None or self._joined[0] != key:
            self._joined = key, _join([(b.factors(x), b.knob.value) for b in acting])
        return self._joined[1], 1.0

    def gated(self, x: Tensor) -> list[tuple[LayerBranch, Tensor]]:
        """The gated branches that act on this input, with the rows of `x`, flattened but for C, they act on."""
        if not self._gates or (scope := self._gates[0][1].scope()).quiet:  # all gates of a layer read one scope
            return []
        acting = [(b, gate) for b, gate in self._gates if b.knob.value != 0]
        return [(b, rows) for b, gate in acting if (rows := scope.open_rows(gate.tokens, x)) is not None]


def _join(parts: list[tuple[Delta, float]]) -> Delta:
    up = torch.cat([delta.up * strength for delta, strength in parts], dim=1)  # (O, ΣQ)
    return Delta(up, torch.cat([delta.down for delta, _ in parts], dim=0))  # (ΣQ, I)


class AdaptedLinear(_Adapted, nn.Linear):
    """A linear layer and the branches attached to it. Shares the base layer's Parameters."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw weights
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self.start(base)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if (acting := self.open_delta(x)) is not None:
            delta, strength = acting
            hidden = F.linear(x, delta.down).flatten(0, -2)  # (N, Q)
            # One fused product: no (N, O) temporary for the branch, none for its strength.
            out = torch.addmm(y.flatten(0, -2), hidden, delta.up.T.to(hidden.dtype), alpha=strength)
            y = out.view(y.shape)
        for branch, rows in self.gated(x):
            y = _add_at(y, rows, x, branch)
        return y


class AdaptedConv1x1(_Adapted, nn.Conv2d):
    """A 1x1 convolution (O, I, 1, 1) and the branches attached to it, each a (O, I) matrix per pixel."""

    def __init__(self, base: nn.Conv2d) -> None:
        nn.Conv2d.__init__(self, base.in_channels, base.out_channels, 1, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self.start(base)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if (acting := self.open_delta(x)) is not None:
            y = y + _convolve(x, acting[0]).to(y.dtype) * acting[1]
        if gated := self.gated(cells := x.flatten(2).transpose(1, 2)):  # (B, HW, C): pixels are rows
            last = y.flatten(2).transpose(1, 2)
            for branch, rows in gated:
                last = _add_at(last, rows, cells, branch)
            # In the memory layout of y: other kernels would round the neighbours in a batch differently.
            y = torch.empty_like(y).copy_(last.transpose(1, 2).view_as(y))
        return y


def _add_at(y: Tensor, rows: Tensor, x: Tensor, branch: LayerBranch) -> Tensor:
    """y (…, O) with the branch's change of x (…, I) added at some of the flattened rows."""
    delta, picked = branch.factors(x), x.flatten(0, -2).index_select(0, rows)
    change = F.linear(F.linear(picked, delta.down), delta.up) * branch.knob.value
    return y.flatten(0, -2).index_add(0, rows, change.to(y.dtype)).view(y.shape)


def _convolve(x: Tensor, delta: Delta) -> Tensor:
    return F.conv2d(F.conv2d(x, delta.down[:, :, None, None]), delta.up[:, :, None, None])


def adapted(base: nn.Module) -> AdaptedLinear | AdaptedConv1x1:
    """`base` with room for branches."""
    if isinstance(base, nn.Conv2d):
        return AdaptedConv1x1(base)
    assert isinstance(base, nn.Linear)
    return AdaptedLinear(base)
