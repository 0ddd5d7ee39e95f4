"""A base in half precision on a CPU convolves in float32, and is otherwise as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusion
import tiny
from fusion.models.adapted_layers import AdaptedConv
from fusion.models.float32_convolutions import Float32Conv2d, convolve_in_float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "padding": 1, "bias": False}])
def test_outputs_and_gradients_are_those_of_float32_rounded(dtype, options):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, **options).to(dtype).requires_grad_(False), torch.randn(2, 4, 8, 8).to(dtype)
    exact = copy.deepcopy(layer).float()
    convolve_in_float32(layer)
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    outputs = [module(value) for module, value in zip((layer, exact), inputs, strict=True)]
    assert torch.equal(outputs[0], outputs[1].to(dtype))
    gradient = torch.randn_like(outputs[0])
    outputs[0].backward(gradient)
    outputs[1].backward(gradient.float())
    assert torch.equal(inputs[0].grad, inputs[1].grad.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), outputs[0])
    assert torch.equal(AdaptedConv(layer, lambda: None, None)(x), outputs[0])  # a 1x1 of SD 1.x's with an adapter
    assert torch.equal(layer.float()(x.float()), F.conv2d(x.float(), exact.weight, exact.bias, **sizes(exact)))


def sizes(layer):
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


def test_bases_that_are_opened_in_half_precision_on_a_cpu_have_them(tmp_path):
    tiny.pipeline("sd1").save_pretrained(tmp_path / "base")
    for dtype, number in (("float32", 0), ("bfloat16", 34)):
        pipe = fusion.open_pipeline(tmp_path / "base", device="cpu", dtype=dtype)
        modules = [*pipe.unet.modules(), *pipe.vae.modules()]
        convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
        assert sum(type(module) is Float32Conv2d for module in convolutions) == number * len(convolutions) / 34
        assert fusion.generate(pipe, fusion.GenerationConfig(prompt="a dog", num_inference_steps=1))
