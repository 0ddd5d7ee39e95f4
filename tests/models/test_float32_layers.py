"""A base in half precision on a CPU without instructions for it computes in float32, and is otherwise as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusion
import tiny
from fusion.models import float32_layers
from fusion.models.adapted_layers import AdaptedConv, AdaptedLinear
from fusion.models.float32_layers import Float32Conv2d, Float32Linear, compute_in_float32
from trained import attached, draw, trained_adapter


@pytest.fixture(autouse=True)
def old_cpu(monkeypatch):
    """A CPU without instructions for half precision, wherever the tests run."""
    monkeypatch.setattr(float32_layers, "computes_in", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(float32_layers, "BLOCK", 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "padding": 1, "bias": False}, None])
def test_outputs_and_gradients_are_those_of_float32_rounded(dtype, options):
    torch.manual_seed(0)
    layer = (nn.Linear(8, 6) if options is None else nn.Conv2d(4, 6, 3, **options)).to(dtype).requires_grad_(False)
    x, exact = torch.randn(2, 4, 8, 8).to(dtype), copy.deepcopy(layer).float()
    compute_in_float32(layer)
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    outputs = [module(value) for module, value in zip((layer, exact), inputs, strict=True)]
    assert_rounded(outputs[0], outputs[1], dtype)
    gradient = torch.randn_like(outputs[0])
    outputs[0].backward(gradient)
    outputs[1].backward(gradient.float())
    assert_rounded(inputs[0].grad, inputs[1].grad, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), outputs[0])
    adapted = AdaptedLinear if options is None else AdaptedConv  # a 1x1 of SD 1.x's with an adapter
    assert torch.equal(adapted(layer, lambda: None, None)(x), outputs[0])
    expected = exact(x.float()) if options is None else F.conv2d(x.float(), exact.weight, exact.bias, **sizes(exact))
    assert torch.equal(layer.float()(x.float()), expected)


def assert_rounded(result, exact, dtype):
    """Equal after rounding, but for the order of sums in blocks of rows: float32's own error."""
    assert result.dtype == dtype
    assert torch.allclose(result.float(), exact.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def sizes(layer):
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


def test_bases_that_are_opened_in_half_precision_on_a_cpu_have_them(tmp_path):
    tiny.pipeline("sd1").save_pretrained(tmp_path / "base")
    for dtype, half in (("float32", False), ("bfloat16", True)):
        pipe = fusion.open_pipeline(tmp_path / "base", device="cpu", dtype=dtype)
        modules = [*pipe.unet.modules(), *pipe.vae.modules(), *pipe.text_encoder.modules()]
        kinds = {type(module) for module in modules if isinstance(module, nn.Linear | nn.Conv2d)}
        assert kinds == ({Float32Linear, Float32Conv2d} if half else {nn.Linear, nn.Conv2d})
        assert fusion.generate(pipe, fusion.GenerationConfig(prompt="a dog", num_inference_steps=1))
    rex, tom = trained_adapter(pipe), trained_adapter(pipe, "<tom>", k=1)
    before, base = list(map(id, modules)), draw(pipe, "a dog")
    with attached(pipe, rex):
        alone = draw(pipe, "a <rex>")
    with attached(pipe, tom, rex):
        assert torch.equal(draw(pipe, "a <rex>"), alone) and torch.equal(draw(pipe, "a dog"), base)
    assert [id(m) for part in (pipe.unet, pipe.vae, pipe.text_encoder) for m in part.modules()] == before


def test_no_weight_but_the_layers_own_is_cast_and_rows_are_in_blocks(monkeypatch):
    layer, shapes, product = nn.Linear(8, 6).bfloat16().requires_grad_(False), [], F.linear
    compute_in_float32(layer)
    monkeypatch.setattr(F, "linear", lambda x, *others: (shapes.append(tuple(x.shape)), product(x, *others))[1])
    result = layer(torch.randn(2, 4, 8).bfloat16().requires_grad_())
    assert shapes == [(3, 8), (3, 8), (2, 8)] and result.shape == (2, 4, 6)
    assert [tensor.dtype for tensor in result.grad_fn.saved_tensors] == [torch.bfloat16]  # nothing in float32 is kept
