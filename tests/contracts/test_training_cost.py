"""Training through gates: no dense temporary, checkpointing changes no gradient, only what is trained gets one."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import tiny
from fusion.adapters import ADAPTERS
from fusion.models.adapted_layers import LayerBranch, Strength, adapted
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts, predict
from fusion.models.gates import PictureRows, TokenRows
from fusion.models.layer_sites import components
from trained import draw, everywhere, trained_adapter, trained_layer

every_type = pytest.mark.parametrize("kind", ADAPTERS)
TIME_IDS = [(16, 16, 0, 0, 16, 16)] * 2


class Made(TorchDispatchMode):
    """Notes the number of elements of every tensor that comes into being, views apart."""

    def __init__(self):
        super().__init__()
        self.sizes, self.known = {}, WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.sizes.setdefault(tensor.numel(), str(function))
        return result


@every_type
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("convolution", [False, True])
def test_no_matrix_of_the_size_of_a_weight_is_made_in_training(kind, gated, convolution):
    out, width, rows = 97, 89, 12
    base = nn.Conv2d(width, out, 1) if convolution else nn.Linear(width, out)
    base.requires_grad_(False)
    layer = trained_layer(kind, base.weight.flatten(1))
    x = torch.randn(2, width, 3, 2) if convolution else torch.randn(2, rows // 2, width)
    x.requires_grad_()
    rows_of_call = TokenRows({"<a>": torch.arange(rows)}, rows)
    if convolution:
        rows_of_call = PictureRows({"<a>": [(0, 0), (1, 0)]}, 2)
    wrapped = adapted(base, lambda: rows_of_call)
    wrapped.add(0, LayerBranch(layer.delta, Strength(1.0), ("<a>",) if gated else ()))
    with Made() as made:
        wrapped(x).square().sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in layer.parameters())
    largest = max(made.sizes)
    assert largest < out * width, f"{made.sizes[largest]} made {largest} elements, the weight has {out * width}"


def gradients(pipe, adapter, *, checkpointed, prompts=("a <rex>", "a dog"), rounds=1):
    """Of a few denoising losses in one graph, with and without recomputing layers on the way back."""
    for part in components(pipe).values():
        part.requires_grad_(False)
        part.train(checkpointed)
        getattr(part, f"{'enable' if checkpointed else 'disable'}_gradient_checkpointing", lambda: None)()
        getattr(part, f"activation_checkpointing_{'enable' if checkpointed else 'disable'}", lambda: None)()
    rows = [row.requires_grad_() for row in adapter.tokens["<rex>"].values()]
    trained = [*adapter.parameters(), *rows]
    torch.manual_seed(3)
    total = torch.zeros(())
    with attach(pipe, adapter, live=True):
        for i in range(rounds):
            conditioning = encode_prompts(pipe, prompts[i:] + prompts[:i])
            noisy = torch.randn(2, 4, 8, 8)
            total = total + predict(pipe, noisy, torch.tensor([10, 500]), conditioning, TIME_IDS).square().mean()
        return torch.autograd.grad(total, trained, materialize_grads=True)  # SDXL leaves the last text layers out


@pytest.mark.parametrize("rounds", [1, 2])
def test_gradient_checkpointing_gives_the_same_gradients(rounds, pipe):
    """Also when the gates have moved on to another batch before the way back begins."""
    adapter = trained_adapter(pipe, targets=everywhere(pipe), scale=0.05)
    plain, recomputed = (gradients(pipe, adapter, checkpointed=c, rounds=rounds) for c in (False, True))
    for one, two in zip(plain, recomputed, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
    assert sum(float(one.abs().sum()) > 0 for one in plain) > 0.9 * len(plain)


@every_type
def test_only_the_adapter_and_the_rows_of_its_token_learn(kind):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, kind=kind, scale=0.05)
    for part in components(pipe).values():
        part.requires_grad_(False)
    before = {n: [p.clone() for p in part.parameters()] for n, part in components(pipe).items()}
    found = gradients(pipe, adapter, checkpointed=False)
    assert all(float(gradient.abs().sum()) > 0 for gradient in found)
    assert not [p for part in components(pipe).values() for p in part.parameters() if p.grad is not None]
    for name, part in components(pipe).items():
        assert all(torch.equal(*pair) for pair in zip(before[name], part.parameters(), strict=True))


def test_a_batch_without_the_token_teaches_nothing():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe)
    for part in components(pipe).values():
        part.requires_grad_(False)
    with attach(pipe, adapter, live=True):
        states = encode_prompts(pipe, ["a dog", "a cat"])
        prediction = predict(pipe, torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), states, TIME_IDS)
    assert not prediction.requires_grad


def test_live_layers_are_read_at_every_call_and_others_once():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, gated=False)
    for live in (True, False):
        with attach(pipe, adapter, live=live):
            before = draw(pipe)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.mul_(0.5)
            assert torch.equal(draw(pipe), before) is not live
