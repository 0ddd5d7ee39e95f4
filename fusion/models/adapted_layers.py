"""Layers with adapters attached: W x + Σ strength · up (down x), each branch behind its gate.

torch.compile does not look into the branches: a compiled model calls them through an operator, so one graph serves
whatever is attached, prompted and set as strength when it runs.

Shapes: O out_features, I in_features, Q rank of a delta, N rows of the input.
"""

import itertools
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.models.float32_layers import Float32Linear
from fusion.models.gates import Rows
from fusion.spectral.delta import Delta

# An operator of torch.compile that changes no input. CUDA graphs cannot replay it: it decides at every call.
OPERATOR: dict[str, Any] = {"mutates_args": ()}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    OPERATOR["tags"] = (torch.Tag.cudagraph_unsafe,)
_numbers = itertools.count()
_layers: "weakref.WeakValueDictionary[int, _Adapted]" = weakref.WeakValueDictionary()  # an operator takes no objects
Outputs = Callable[[], "weakref.WeakKeyDictionary[nn.Module, Any]"]


@dataclass
class Strength:
    """A branch's strength, shared by all its layers and changed at run time."""

    value: float


class LayerBranch:
    """One branch on one layer: its ΔW, its strength, and the tokens of its gate (none: it acts everywhere)."""

    def __init__(self, source: Callable[[], Delta] | Delta, strength: Strength, gate: tuple[str, ...] = ()) -> None:
        self.source, self.strength, self.gate = source, strength, gate
        self._cast: Delta | None = None  # fixed factors where they were used last; the source stays float32

    @property
    def fixed(self) -> bool:
        return isinstance(self.source, Delta)

    def factors(self, x: Tensor) -> Delta:
        """ΔW on the device and in the dtype of `x`."""
        if not isinstance(self.source, Delta):
            with torch.autocast(x.device.type, enabled=False):  # the maths stays in float32, the products need not
                return self.source().to(x.device, x.dtype)
        cast = self._cast
        if cast is None or cast.up.device != x.device or cast.up.dtype != x.dtype:
            cast = self._cast = self.source.to(x.device, x.dtype)
        return cast


class _Adapted(nn.Module):
    """What adapted linear layers and convolutions share: the base module, and the branches by key."""

    base: nn.Module
    branches: dict[int, LayerBranch]

    def _start(self, base: nn.Module, rows: Callable[[], Rows | None], outputs: Outputs | None) -> None:
        # Past nn.Module's registry: state-dict keys, .parameters() and .to() stay those of the base layer.
        object.__setattr__(self, "base", base)
        self._rows, self._outputs = rows, outputs
        self.branches, self._ungated = {}, list[LayerBranch]()
        self._by_gate_token: dict[str, dict[int, LayerBranch]] = {}
        self._sum: tuple[tuple[object, ...], Delta] | None = None
        # A tensor, since torch.compile would take a number for a constant and compile every layer anew.
        self._number = torch.tensor(next(_numbers))
        _layers[int(self._number)] = self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy or a pickle is the base module's, and opens without this toolkit."""
        return operator.itemgetter(0), ((self.base,),)

    def add(self, key: int, branch: LayerBranch) -> None:
        """Attach a branch; sums are taken in the order of gates, then keys, so keys grow."""
        self.branches[key] = branch
        if not branch.gate:
            self._ungated = [*self._ungated, branch]  # a new list: another thread may read the other now
        for token in branch.gate:
            self._by_gate_token.setdefault(token, {})[key] = branch
        self._sum = None

    def remove(self, key: int) -> None:
        branch = self.branches.pop(key)
        self._ungated = [other for other in self._ungated if other is not branch]
        for token in branch.gate:
            del self._by_gate_token[token][key]
            if not self._by_gate_token[token]:
                del self._by_gate_token[token]
        self._sum = None

    def with_branches(self, y: Tensor, x: Tensor) -> Tensor:
        """The base layer's output y for x, changed by every branch that acts."""
        raise NotImplementedError

    def _ungated_branches(self) -> list[LayerBranch]:
        return [branch for branch in self._ungated if branch.strength.value]

    def _gated_branches(self, rows: Rows | None) -> list[LayerBranch]:
        """Gated branches of the tokens present. In one order whichever was attached first: sums round alike."""
        if not self._by_gate_token or rows is None:
            return []
        present = {key: b for token in rows.tokens for key, b in self._by_gate_token.get(token, {}).items()}
        keys = sorted(present, key=lambda key: (present[key].gate, key))
        return [present[key] for key in keys if present[key].strength.value]

    def _ungated_delta(self, x: Tensor) -> tuple[Delta, float] | None:
        """All branches without a gate as one ΔW and the strength it still needs; None if nothing acts."""
        acting = self._ungated_branches()
        if len(acting) <= 1:
            return (acting[0].factors(x), acting[0].strength.value) if acting else None
        if not all(branch.fixed for branch in acting):
            return _concatenated([(b.factors(x), b.strength.value) for b in acting]), 1.0
        key, cached = (x.device, x.dtype, tuple(b.strength.value for b in acting)), self._sum
        if cached is None or cached[0] != key:
            cached = self._sum = key, _concatenated([(b.factors(x), b.strength.value) for b in acting])
        return cached[1], 1.0

    def _gated_rows(self, x: Tensor) -> list[tuple[LayerBranch, Tensor]]:
        """The gated branches that act on this input, with the rows of `x`, flattened but for C, they act on."""
        if (rows := self._rows()) is None:
            return []
        branches = self._gated_branches(rows)
        return [(b, matching) for b in branches if (matching := rows.matching(b.gate, x)) is not None]

    def acts_on(self, x: Tensor) -> Tensor:
        """Which rows of the input (…, I), flattened, any branch acts on: (N,) of bool, whatever the strengths."""
        mask = torch.zeros(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)  # (N,)
        rows = self._rows()
        for branch in self.branches.values():
            if not branch.gate:
                mask[:] = True
            elif rows is not None and (matching := rows.matching(branch.gate, x)) is not None:
                mask[matching] = True
        return mask


class AdaptedLinear(_Adapted, nn.Linear):
    """A linear layer and the branches attached to it. Shares the base layer's Parameters."""

    def __init__(self, base: nn.Linear, rows: Callable[[], Rows | None], outputs: Outputs | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw weights
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self._product = Float32Linear.product if type(base) is Float32Linear else F.linear
        self._calls_base = not _is_plain(base, nn.Linear, Float32Linear)
        self._start(base, rows, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _compiled(self, self._of_base(x), x)
        if self._outputs is not None and not (torch.is_grad_enabled() or x.is_inference()):
            return self._cached(x)
        return self.with_branches(self._of_base(x), x)

    def _of_base(self, x: Tensor) -> Tensor:
        """The base layer's output, by its own forward where that is more than a product: quantised, or with hooks."""
        return self.base(x) if self._calls_base else self._product(x, self.weight, self.bias)

    def _cached(self, x: Tensor) -> Tensor:
        """The output for x, from the call before if x is the same tensor and all it depends on is as it was."""
        assert self._outputs is not None
        rows, outputs, kind = self._rows(), self._outputs(), x.device.type
        acting = [*self._ungated_branches(), *self._gated_branches(rows)]
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        weights = [(t.data_ptr(), t._version) for t in (self.weight, self.bias) if t is not None]
        key = x._version, rows, cast, weights, [(branch, branch.strength.value) for branch in acting]
        if (cached := outputs.get(self)) is not None:
            reference, version, cached_key, y = cached
            if reference() is x and y._version == version and cached_key == key:
                return y
        y = self.with_branches(self._of_base(x), x)
        if all(branch.fixed for branch in acting):
            outputs[self] = weakref.ref(x), y._version, key, y
        return y

    def with_branches(self, y: Tensor, x: Tensor) -> Tensor:
        if (ungated := self._ungated_delta(x)) is not None:
            delta, strength = ungated
            hidden = F.linear(x, delta.down).flatten(0, -2)  # (N, Q)
            # One fused product: no (N, O) temporary for the branch, none for its strength.
            out = torch.addmm(y.flatten(0, -2), hidden, delta.up.T.to(hidden.dtype), alpha=strength)
            y = out.view(y.shape)
        for branch, rows in self._gated_rows(x):
            y = _add_at(y, rows, x, branch)
        return y


class AdaptedConv(_Adapted, nn.Conv2d):
    """A convolution (O, I, k, k) and the branches attached to it, each a (O, I·k·k) matrix per cell of the output."""

    def __init__(self, base: nn.Conv2d, rows: Callable[[], Rows | None], outputs: Outputs | None) -> None:
        size = base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding
        nn.Conv2d.__init__(self, *size, bias=base.bias is not None, device="meta")  # pyright: ignore[reportArgumentType]
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self._calls_base = not _is_plain(base, nn.Conv2d)
        self._start(base, rows, outputs)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base: Any = self.base
        return base._conv_forward(input, weight, bias)  # in the base layer's own precision

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) if self._calls_base else super().forward(x)
        return _compiled(self, y, x) if torch.compiler.is_compiling() else self.with_branches(y, x)

    def with_branches(self, y: Tensor, x: Tensor) -> Tensor:
        if (ungated := self._ungated_delta(x)) is not None:
            y = y + self._convolve(x, ungated[0]).to(y.dtype) * ungated[1]
        if self._gated_branches(self._rows()) and (gated := self._gated_rows(cells := self._cells(x))):
            last = y.flatten(2).transpose(1, 2)
            for branch, rows in gated:
                last = _add_at(last, rows, cells, branch)
            # In the memory layout of y: other kernels would round the neighbours in a batch differently.
            y = torch.empty_like(y).copy_(last.transpose(1, 2).view_as(y))
        return y

    def _cells(self, x: Tensor) -> Tensor:
        """What each cell of the output is computed from, (B, cells, I·k·k)."""
        if self.kernel_size == (1, 1):
            return x.flatten(2).transpose(1, 2)
        options = {"padding": self.padding, "stride": self.stride}
        return F.unfold(x, self.kernel_size, **options).transpose(1, 2)  # pyright: ignore[reportArgumentType]

    def _convolve(self, x: Tensor, delta: Delta) -> Tensor:
        down = delta.down.unflatten(1, (self.in_channels, *self.kernel_size))  # (Q, I, k, k)
        return F.conv2d(F.conv2d(x, down, stride=self.stride, padding=self.padding), delta.up[:, :, None, None])


def adapted(
    base: nn.Module, rows: Callable[[], Rows | None] = lambda: None, outputs: Outputs | None = None
) -> AdaptedLinear | AdaptedConv:
    """`base` with room for branches.

    `rows`: the rows of the call under way, by token. `outputs`: where a layer that is given the same tensor again and
    again, as the prompt from one denoising step to the next, keeps its output.
    """
    if isinstance(base, nn.Conv2d):
        return AdaptedConv(base, rows, outputs)
    assert isinstance(base, nn.Linear)
    return AdaptedLinear(base, rows, outputs)


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of the module is the forward of one of these classes, without hooks, and not replaced."""
    replaced = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    return not replaced and any(type(module).forward is kind.forward for kind in kinds)


def base_of(module: nn.Module) -> nn.Module:
    """The base's own module, whether or not adapters are attached to it."""
    return module.base if isinstance(module, _Adapted) else module


@torch.library.custom_op("spectral_fusion::with_branches", **OPERATOR)
def _branches_operator(y: Tensor, x: Tensor, number: Tensor) -> Tensor:
    out = _layers[int(number)].with_branches(y, x)
    # An operator returns a tensor of its own, in the layout that `_shape` promised.
    return torch.empty_like(y).copy_(out) if out is y or out.stride() != y.stride() else out


@_branches_operator.register_fake
def _shape(y: Tensor, x: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(y)


def _compiled(layer: _Adapted, y: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # gradients of branches, which the operator does not take
        return outside_graphs(layer.with_branches, y, x)
    return _branches_operator(y, x, layer._number)


def outside_graphs(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function uncompiled, also from inside a compiled model."""
    if not torch.compiler.is_compiling():
        return function(*args)
    from fusion.models.graph_breaks import call  # it loads torch._dynamo, which takes seconds

    return call(function, *args)


def _concatenated(parts: list[tuple[Delta, float]]) -> Delta:
    up = torch.cat([delta.up * strength for delta, strength in parts], dim=1)  # (O, ΣQ)
    return Delta(up, torch.cat([delta.down for delta, _ in parts], dim=0))  # (ΣQ, I)


def _add_at(y: Tensor, rows: Tensor, x: Tensor, branch: LayerBranch) -> Tensor:
    """y (…, O) with the branch's change of x (…, I) added at some of the flattened rows, by index or by mask."""
    if rows.dtype == torch.bool:
        delta = branch.factors(x)
        hidden = F.linear(x, delta.down).flatten(0, -2) * rows[:, None]  # (N, Q), zero at the other rows
        up = delta.up.T.to(hidden.dtype)
        return torch.addmm(y.flatten(0, -2), hidden, up, alpha=branch.strength.value).view(y.shape)
    delta, chosen = branch.factors(x), x.flatten(0, -2).index_select(0, rows)
    change = F.linear(F.linear(chosen, delta.down), delta.up) * branch.strength.value
    return y.flatten(0, -2).index_add(0, rows, change.to(y.dtype)).view(y.shape)
