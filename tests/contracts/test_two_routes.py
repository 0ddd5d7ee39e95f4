"""Two routes agree: the attached layer, and the base layer with W + ΔW (law 3)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion.adapters import ADAPTERS
from fusion.errors import GatingError
from fusion.models.adapted_layers import AdaptedConv, AdaptedLinear, LayerBranch, Strength, adapted
from fusion.models.gates import PictureRows, TokenRows
from trained import moved, trained_layer

every_type = pytest.mark.parametrize("kind", ADAPTERS)


def token_rows(rows, size):
    return TokenRows({"<a>": torch.tensor(rows)} if rows else {}, size)


def linear(out=20, width=12, bias=True):
    return nn.Linear(width, out, bias=bias)


def expected(base, x, change):
    weight = (base.weight.flatten(1) + change).view_as(base.weight)
    return F.linear(x, weight, base.bias) if isinstance(base, nn.Linear) else F.conv2d(x, weight, base.bias)


@every_type
@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (2, 3, 4, 12), (1, 1, 12)])
def test_a_linear_layer_with_an_open_branch(kind, live, shape):
    base, x = linear(bias=len(shape) != 2), torch.randn(shape)
    layer, wrapped = trained_layer(kind, base.weight), adapted(base)
    wrapped.add(0, LayerBranch(layer.delta if live else layer.delta().detach(), Strength(0.7)))
    assert torch.allclose(wrapped(x), expected(base, x, 0.7 * layer.delta().dense()), atol=1e-4)


@every_type
@pytest.mark.parametrize("live", [True, False])
def test_a_1x1_convolution_with_an_open_branch(kind, live):
    base, x = nn.Conv2d(12, 20, 1), torch.randn(2, 12, 5, 4)
    layer, wrapped = trained_layer(kind, base.weight.flatten(1)), adapted(base)
    wrapped.add(0, LayerBranch(layer.delta if live else layer.delta().detach(), Strength(-0.7)))
    assert torch.allclose(wrapped(x), expected(base, x, -0.7 * layer.delta().dense()), atol=1e-4)


@every_type
@pytest.mark.parametrize("live", [True, False])
def test_a_gate_by_position_acts_on_its_rows_alone(kind, live):
    base, x, rows = linear(), torch.randn(2, 5, 12), [1, 4, 7]
    layer, wrapped = trained_layer(kind, base.weight), adapted(base, lambda: token_rows(rows, 10))
    wrapped.add(0, LayerBranch(layer.delta if live else layer.delta().detach(), Strength(0.7), ("<a>",)))
    output, changed = wrapped(x).flatten(0, 1), expected(base, x, 0.7 * layer.delta().dense()).flatten(0, 1)
    shut = [i for i in range(10) if i not in rows]
    assert torch.equal(output[shut], base(x).flatten(0, 1)[shut])
    assert torch.allclose(output[rows], changed[rows], atol=1e-4)


@pytest.mark.parametrize(
    "base, x", [(linear(), torch.randn(3, 5, 12)), (nn.Conv2d(12, 20, 1), torch.randn(3, 12, 4, 4))]
)
def test_a_gate_by_picture_acts_on_whole_pictures(base, x):
    layer = trained_layer("additive", base.weight.detach().flatten(1))
    wrapped = adapted(base, lambda: PictureRows({"<a>": [(0, 0), (2, 0)]}, 3))
    wrapped.add(0, LayerBranch(layer.delta().detach(), Strength(0.7), ("<a>",)))
    output, changed = wrapped(x), expected(base, x, 0.7 * layer.delta().dense())
    assert torch.equal(output[1], base(x)[1])
    assert torch.allclose(output[[0, 2]], changed[[0, 2]], atol=1e-4)


@pytest.mark.parametrize("live", [(False, False, False), (True, True, True), (True, False, True)])
def test_several_branches_add_up(live):
    base, x = linear(), torch.randn(2, 5, 12)
    wrapped, total = adapted(base, lambda: token_rows([3], 10)), torch.zeros(20, 12)
    for key, (kind, fresh, strength) in enumerate(
        zip(("additive", "lora", "core"), live, (1.0, -0.5, 2.0), strict=True)
    ):
        layer = trained_layer(kind, base.weight, k=key % 3)
        wrapped.add(key, LayerBranch(layer.delta if fresh else layer.delta().detach(), Strength(strength)))
        total += strength * layer.delta().detach().dense()
    gated = trained_layer("lora", base.weight)
    wrapped.add(9, LayerBranch(gated.delta().detach(), Strength(1.5), ("<a>",)))
    output, y = wrapped(x).flatten(0, 1), expected(base, x, total).flatten(0, 1)
    row = expected(base, x, total + 1.5 * gated.delta().dense()).flatten(0, 1)[3]
    assert torch.allclose(output[3], row, atol=1e-3)
    others = [i for i in range(10) if i != 3]
    assert torch.allclose(output[others], y[others], atol=1e-3)


def test_summed_branches_follow_every_change():
    base, x = linear(), torch.randn(2, 5, 12)
    wrapped, layers = adapted(base), [trained_layer("lora", base.weight) for _ in range(3)]
    strengths = [Strength(1.0) for _ in layers]

    def check(present):
        total = sum((strengths[i].value * layers[i].delta().dense() for i in present), torch.zeros(20, 12))
        assert torch.allclose(wrapped(x), expected(base, x, total), atol=1e-4)

    for key, (layer, strength) in enumerate(zip(layers, strengths, strict=True)):
        wrapped.add(key, LayerBranch(layer.delta().detach(), strength))
        check(range(key + 1))
    strengths[1].value = -2.0
    check(range(3))
    strengths[0].value = 0.0
    check(range(3))
    wrapped.remove(1)
    check([0, 2])
    assert wrapped(x.bfloat16().float()).dtype == torch.float32
    wrapped.remove(0)
    wrapped.remove(2)
    assert torch.equal(wrapped(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_half_precision_layers_cast_at_the_branch(dtype, gated):
    base = linear().to(dtype)
    x, layer = torch.randn(2, 5, 12).to(dtype), trained_layer("additive", base.weight)
    delta, wrapped = layer.delta().detach(), adapted(base, lambda: token_rows(list(range(10)), 10))
    wrapped.add(0, LayerBranch(delta, Strength(1.0), ("<a>",) if gated else ()))
    reference = F.linear(x.float(), base.weight.float() + delta.dense(), base.bias.float())
    assert wrapped(x).dtype == dtype and delta.up.dtype == torch.float32
    assert (wrapped(x).float() - reference).norm() < 8 * torch.finfo(dtype).eps * reference.norm()


@every_type
@pytest.mark.parametrize("gated", [True, False])
def test_live_branches_compute_their_change_in_float32_under_autocast(kind, gated):
    base = linear(40, 24)
    layer, wrapped = trained_layer(kind, base.weight), adapted(base, lambda: token_rows([0, 3], 10))
    if kind == "guarded":  # a guard at work
        layer = moved(ADAPTERS[kind].fresh(base.weight, layer_slice()))
    branch = LayerBranch(layer.delta, Strength(1.0), ("<a>",) if gated else ())
    wrapped.add(0, branch)
    x = torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        factors, y = branch.factors(x), wrapped(x)
        y.float().square().sum().backward()
    assert torch.equal(factors.up, layer.delta().up) and torch.equal(factors.down, layer.delta().down)
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def layer_slice():
    from fusion.spectral.slices import SpectralSlice

    return SpectralSlice.contiguous(0, 4)


def test_an_adapted_layer_passes_for_its_base():
    for base in (linear(), nn.Conv2d(12, 20, 1, bias=False)):
        base.eval()
        wrapped = adapted(base)
        assert isinstance(wrapped, AdaptedLinear | AdaptedConv) and isinstance(wrapped, type(base))
        assert wrapped.weight is base.weight and wrapped.bias is base.bias and not wrapped.training
        assert list(wrapped.state_dict()) == list(base.state_dict()) and len(list(wrapped.modules())) == 1
        assert repr(wrapped).split("(")[1] == repr(base).split("(")[1]


def test_making_room_for_branches_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    for base in (linear(), nn.Conv2d(12, 20, 1)):
        before = torch.random.get_rng_state()
        adapted(base)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_a_gate_read_from_other_rows_is_an_error_and_a_shut_one_is_not():
    base, delta = linear(), trained_layer("lora", linear().weight).delta().detach()
    wrapped = adapted(base, lambda: token_rows([1], 10))
    wrapped.add(0, LayerBranch(delta, Strength(1.0), ("<a>",)))
    with pytest.raises(GatingError, match=r"<a> was read from 10 rows.*\(3, 5, 12\)"):
        wrapped(torch.randn(3, 5, 12))
    wrapped = adapted(base, lambda: token_rows([], 10))
    wrapped.add(0, LayerBranch(delta, Strength(1.0), ("<a>",)))
    x = torch.randn(3, 5, 12)
    assert torch.equal(wrapped(x), base(x))


def test_a_gate_of_several_tokens_acts_once_where_any_of_them_stands():
    base, x = linear(), torch.randn(1, 6, 12)
    rows = TokenRows({"<a>": torch.tensor([1, 2]), "<b>": torch.tensor([2, 4]), "<c>": torch.tensor([5])}, 6)
    wrapped, layer = adapted(base, lambda: rows), trained_layer("lora", base.weight)
    wrapped.add(0, LayerBranch(layer.delta().detach(), Strength(1.0), ("<b>", "<a>", "<z>")))
    changed = expected(base, x, layer.delta().dense())
    assert torch.allclose(wrapped(x)[:, [1, 2, 4]], changed[:, [1, 2, 4]], atol=1e-4)
    assert torch.equal(wrapped(x)[:, [0, 3, 5]], base(x)[:, [0, 3, 5]])
