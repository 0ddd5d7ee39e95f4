"""Convolutions of a base in half precision, computed in float32 on a CPU.

CPUs without instructions for bfloat16 convolve it by plain loops: measured, 180 times slower than float32. Weights stay
in half precision and are cast layer by layer, for as long as a layer computes, so that they take no more memory.

Shapes: B pictures, I in_channels, O out_channels, h w height and width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 what a CPU is given in half precision; elsewhere an ordinary one."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu"
        trained = weight.requires_grad and torch.is_grad_enabled()
        if not half or trained or self.padding_mode != "zeros" or torch.compiler.is_compiling():
            return super()._conv_forward(input, weight, bias)
        size = self.stride, self.padding, self.dilation, self.groups
        output: Tensor = _Convolution.apply(input, weight, bias, size)  # pyright: ignore[reportAssignmentType]
        return output


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


def convolve_in_float32(*models: nn.Module) -> None:
    """Let all ordinary convolutions of the models compute in float32 on a CPU, wherever they are called."""
    for model in models:
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = Float32Conv2d
