"""A training step's kernels, captured once as a CUDA graph for each shape of batch, and repeated for all others.

At a batch of one, a step on a GPU takes as long as Python needs to launch some thousand kernels. What a step launches
depends on the shapes of its batch alone (`fusion.training.step`), so the graph of the first batch computes all others:
they are copied to where it reads. Only gradients are captured: clipping, the optimizer and the gradient scaler, a few
kernels for all parameters, stay what they are, and so do the checkpoints.

The first batch of a shape is computed without a graph. The graph then has to give its gradients again; one that does
not, or cannot be captured, is not used.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion.models.gates import MaskedRows
from fusion.training.step import BatchGradients, StepInputs

logger = logging.getLogger(__name__)

TOLERANCE = 0.02  # relative error of a graph's gradients; kernels that add in any order differ by less in bfloat16


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


class CudaGraph:
    """A function's kernels. All graphs of one `pool` share their memory; so only one at a time may run."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool, self._graph = device, pool, torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Capture the function; nothing is computed. Its result is where each replay writes."""
        stream = torch.cuda.Stream(self._device)  # PyTorch's default one stays on the first card that captured
        # Other threads, as the studio's, may use the card meanwhile.
        capturing = torch.cuda.graph(self._graph, self._pool, stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capturing:
            return function()

    def replay(self) -> None:
        self._graph.replay()

    @staticmethod
    def memory_pool() -> Any:
        return torch.cuda.graph_pool_handle()


class CapturedGradients:
    """`BatchGradients.add` by graphs, for the `parameters` that are trained."""

    def __init__(self, gradients: BatchGradients, parameters: Sequence[Tensor], device: torch.device) -> None:
        self._gradients, self._parameters, self._device = gradients, list(parameters), device
        self._sums = [torch.zeros_like(parameter) for parameter in parameters]  # where graphs add gradients
        self._graphs: dict[object, _BatchGraph] = {}
        self._pool: Any = CudaGraph.memory_pool()
        self._failed = False

    def inputs(self, number: int) -> StepInputs:
        return self._gradients.inputs(number)

    def add(self, inputs: StepInputs, *, last: bool) -> Tensor:
        """As `BatchGradients.add`; the parameters' gradients are tensors of this object, which graphs add to."""
        if self._failed:
            return self._gradients.add(inputs, last=last)
        self._attach_sums()
        form = last, tuple((tensor.shape, tensor.dtype) for tensor in _tensors(inputs))
        if graph := self._graphs.get(form):
            return graph(inputs)
        before = [total.clone() for total in self._sums]
        loss = self._on_side_stream(lambda: self._gradients.add(inputs, last=last))
        expected = [total.clone() for total in self._sums]
        size = _distance(expected, before)
        if math.isfinite(size):  # else the gradient scaler of fp16 is still looking for its scale
            self._capture(form, inputs, last, before, expected, size)
        return loss

    def release(self) -> None:
        """Give the graphs' memory back, which is that of a whole step; the next batches are captured anew."""
        self._graphs.clear()
        self._pool = CudaGraph.memory_pool()

    def _capture(
        self, form: object, inputs: StepInputs, last: bool, before: list[Tensor], expected: list[Tensor], size: float
    ) -> None:
        """Keep a graph for batches of this form if it adds the `expected` gradients to those `before`."""
        try:
            self._graphs[form] = _BatchGraph(self._gradients, inputs, last, CudaGraph(self._device, self._pool))
            torch._foreach_copy_(self._sums, before)
            self._graphs[form](inputs)
            error = _distance(self._sums, expected) / max(size, torch.finfo(torch.float32).tiny)
            problem = "" if error <= TOLERANCE else f"its gradients are off by {error:.1%}"
        except RuntimeError as cause:  # no memory, or something that cannot be captured
            problem = str(cause).strip().partition("\n")[0].rstrip(".") or type(cause).__name__
        torch._foreach_copy_(self._sums, expected)
        if problem:
            self._failed = True
            self._graphs.clear()
            logger.warning("The training goes on without CUDA graphs, as one failed: %s.", problem)

    def _attach_sums(self) -> None:
        """Set the sums to zero and make them the parameters' gradients, unless this step has begun."""
        if self._parameters[0].grad is not self._sums[0]:
            torch._foreach_zero_(self._sums)
            for parameter, total in zip(self._parameters, self._sums, strict=True):
                parameter.grad = total

    def _on_side_stream(self, function: Callable[[], Tensor]) -> Tensor:
        """As PyTorch asks for before a capture: libraries then have been set up on a stream that can be captured."""
        if self._device.type != "cuda":
            return function()
        with torch.cuda.device(self._device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = function()
            current.wait_stream(stream)
        return result


class _BatchGraph:
    """The graph of batches of one shape, and the batch that it reads."""

    def __init__(self, gradients: BatchGradients, inputs: StepInputs, last: bool, graph: CudaGraph) -> None:
        self._inputs, self._graph = copy.deepcopy(inputs), graph
        self._loss = graph.capture(lambda: gradients.add(self._inputs, last=last))

    def __call__(self, inputs: StepInputs) -> Tensor:
        for place, tensor in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._loss.clone()


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors of a batch, in the order of its fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, MaskedRows):
        yield from _tensors(value.masks)
    elif isinstance(value, Mapping | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _distance(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """‖one − two‖, over all parameters."""
    return float(torch.stack([(a - b).norm() for a, b in zip(one, two, strict=True)]).norm())
