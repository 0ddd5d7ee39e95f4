"""Linear layers and convolutions of a base in half precision, computed in float32 on a CPU.

CPUs without instructions for bfloat16 multiply it by plain loops: measured, a linear layer takes 5 to 8 times as long
as in float32, a convolution 180 times. Weights stay in half precision and are cast layer by layer, for as long as a
layer computes; the rows of a linear layer are cast in blocks. So they take no more memory.

Shapes: B pictures, I in_features or in_channels, O out_features or out_channels, N rows, h w height and width.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

BLOCK = 1024  # rows of a linear layer that are cast at a time


@cache
def computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in a half precision; True for other dtypes."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported"
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()


def _is_slow(weight: Tensor) -> bool:
    """Whether a layer should compute in float32 instead. A trained weight should not: its gradient is left out here."""
    trained = weight.requires_grad and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    return weight.device.type == "cpu" and not trained and not compiling and not computes_in(weight.dtype)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 what a CPU is slow at in half precision; elsewhere an ordinary one."""

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(…, I) to (…, O)."""
        if not _is_slow(weight):
            return F.linear(x, weight, bias)
        output: Tensor = _Product.apply(x, weight, bias)  # pyright: ignore[reportAssignmentType]
        return output


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 what a CPU is slow at in half precision; elsewhere an ordinary one."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or not _is_slow(weight):
            return super()._conv_forward(input, weight, bias)
        size = self.stride, self.padding, self.dilation, self.groups
        output: Tensor = _Convolution.apply(input, weight, bias, size)  # pyright: ignore[reportAssignmentType]
        return output


class _Product(torch.autograd.Function):
    """A linear layer in float32 whose weights have no gradient: it keeps neither its input nor the cast weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return _in_blocks(x, weight.float(), None if bias is None else bias.float(), weight.dtype)  # (…, O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _in_blocks(gradients[0], weight.float().T, None, ctx.dtype), None, None  # (…, I)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + b in float32, block by block of the rows of x, rounded to `dtype`."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    y = torch.empty(len(rows), len(weight), dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        for part, into in zip(rows.split(BLOCK), y.split(BLOCK), strict=True):
            into.copy_(F.linear(part.float(), weight, bias))
    return y.view(*x.shape[:-1], len(weight))


class _Convolution(torch.autograd.Function):
    """A convolution in float32 whose weights have no gradient: it keeps neither its input nor the cast weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.shape, ctx.dtype = size, x.shape, x.dtype
        with torch.autocast("cpu", enabled=False):
            y = F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), *size)  # (B, O, h, w)
        return y.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            gradient = conv2d_input(ctx.shape, weight.float(), gradients[0].float(), *ctx.size)  # (B, I, h, w)
        return gradient.to(ctx.dtype), None, None, None


def compute_in_float32(*models: nn.Module) -> None:
    """Let the ordinary linear layers and convolutions of models compute in float32 where a CPU is slow otherwise."""
    classes: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Float32Linear, nn.Conv2d: Float32Conv2d}
    for model in models:
        for module in model.modules():
            if (kind := classes.get(type(module))) is not None:
                module.__class__ = kind
