"""The contract of adapter types, for every row of ADAPTERS: law 2, and the formulas as they were published."""

import pytest
import torch
from accelerate import init_empty_weights

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import float32
from fusion.adapters.layer import LayerOptions, SpectralLayer
from fusion.adapters.layer_stacks import LayerStacks
from fusion.errors import SliceConflict
from fusion.spectral.rotation import cayley
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import decompose
from trained import OPTIONS, moved, trained_layer

SHAPES = [(32, 32), (48, 20), (20, 48), (4, 4), (4, 9)]
HALVES = [torch.float16, torch.bfloat16]
SLICE = SpectralSlice.contiguous(0, 4)

every_type = pytest.mark.parametrize("kind", ADAPTERS)
every_spectral_type = pytest.mark.parametrize("kind", [k for k, c in ADAPTERS.items() if issubclass(c, SpectralLayer)])


@every_type
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_a_fresh_layer_is_exactly_zero_in_every_dtype(kind, shape, dtype):
    layer = ADAPTERS[kind].fresh(torch.randn(shape).to(dtype), SLICE, options=OPTIONS)
    delta = layer.delta()
    assert torch.equal(delta.dense(), torch.zeros(shape, dtype=delta.up.dtype))
    assert delta.shape == shape
    assert {t.dtype for t in layer.state_dict().values()} == {torch.promote_types(dtype, torch.float32)}
    for half in HALVES:
        assert torch.equal(delta.to(dtype=half).dense(), torch.zeros(shape, dtype=half))
    for half in HALVES:  # a file in half precision, used as it is
        assert torch.equal(layer.to(half).delta().dense(), torch.zeros(shape, dtype=half))


@every_type
def test_the_rank_of_the_change_is_bounded_by_the_type(kind):
    delta = trained_layer(kind, torch.randn(40, 24)).delta().detach()
    assert delta.rank <= (8 if kind in ("additive", "guarded") else 4)
    assert delta.dense().isfinite().all() and float(delta.norm()) > 0


@every_type
def test_the_state_dict_is_all_a_file_needs(kind):
    layer = trained_layer(kind, torch.randn(40, 24), k=2)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert {name for name, _ in layer.named_parameters()} <= state.keys()
    torch.manual_seed(99)
    again = ADAPTERS[kind].from_tensors(state)
    assert torch.equal(again.delta().dense(), layer.delta().dense())
    assert again.state_dict().keys() == state.keys()
    assert {*map(id, layer.tensors())} == {*map(id, layer.parameters()), *map(id, layer.buffers())}
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    with init_empty_weights():  # as while another thread opens a model: it is in force for all threads
        beside = ADAPTERS[kind].from_tensors(state)
    assert torch.equal(beside.delta().dense(), layer.delta().dense())


@every_type
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_stacked_layers_are_the_single_ones(kind, shape):
    """ΔW of all layers of one shape in one call, and its gradients, are those of the layers one by one."""
    weights = [torch.randn(shape) for _ in range(3)]
    layers = [trained_layer(kind, weight, k=k) for k, weight in enumerate(weights)]
    other = trained_layer(kind, torch.randn(16, 16))
    single = [layer.delta() for layer in layers]
    names = [(layer, name) for layer in layers for name, _ in layer.named_parameters()]
    towards = [torch.randn(shape) for _ in layers]
    states = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]

    def gradients(deltas):
        loss = sum((delta.dense() * direction).sum() for delta, direction in zip(deltas, towards, strict=True))
        return torch.autograd.grad(loss, [layer.get_parameter(name) for layer, name in names])

    expected = gradients(single)
    stacks = LayerStacks([layers[0], other, *layers[1:]])
    assert [len(stack.layers) for stack in stacks.stacks] == [3, 1]
    with stacks.computed():
        stacked = [stacks.delta(layer) for layer in layers]
        assert stacks.delta(other).shape == (16, 16)
        for one, alone in zip(stacked, single, strict=True):
            assert (one.dense() - alone.dense()).norm() <= 1e-6 * alone.dense().norm()
        for one, alone in zip(gradients(stacked), expected, strict=True):
            assert (one - alone).norm() <= 1e-5 * alone.norm()
    # The layers have the same state as before, in views of the stacked tensors, and compute by themselves again.
    for layer, state, alone in zip(layers, states, single, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
        assert torch.equal(stacks.delta(layer).dense(), alone.dense())


@every_type
def test_training_can_continue_from_a_state_dict(kind):
    weight = torch.randn(40, 24)
    layer = trained_layer(kind, weight)
    resumed = ADAPTERS[kind].fresh(weight, SLICE, options=OPTIONS)
    resumed.load_state_dict(layer.state_dict())
    expected = layer.delta().dense()
    assert (resumed.delta().dense() - expected).norm() <= 1e-6 * expected.norm()


@every_type
def test_a_missing_or_misshapen_tensor_is_an_error(kind):
    state = dict(trained_layer(kind, torch.randn(40, 24)).state_dict())
    for name in state:
        with pytest.raises(KeyError, match=name):
            ADAPTERS[kind].from_tensors({k: v for k, v in state.items() if k != name})
    trainable = next(iter(dict(trained_layer(kind, torch.randn(40, 24)).named_parameters())))
    with pytest.raises(ValueError, match=r"shape|rank"):
        ADAPTERS[kind].from_tensors(state | {trainable: state[trainable][..., :1]})


@every_type
def test_every_parameter_learns_and_its_gradient_is_right(kind):
    layer = moved(ADAPTERS[kind].fresh(torch.randn(9, 7).double(), SLICE, options=LayerOptions(guard=6)))
    names, values = zip(*layer.named_parameters(), strict=True)

    def dense(*tensors):
        return torch.func.functional_call(
            _Change(layer), {f"layer.{n}": t for n, t in zip(names, tensors, strict=True)}, ()
        )

    assert all(value.requires_grad for value in values)
    assert torch.autograd.gradcheck(dense, [value.detach().requires_grad_() for value in values])
    gradients = torch.autograd.grad(layer.delta().dense().square().sum(), values)
    assert all(float(gradient.norm()) > 0 for gradient in gradients)


class _Change(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.delta().dense()


@every_type
def test_a_fresh_layer_has_somewhere_to_go(kind):
    layer = ADAPTERS[kind].fresh(torch.randn(40, 24), SLICE, options=OPTIONS)
    wanted = torch.randn(40, 24)
    gradients = torch.autograd.grad((layer.delta().dense() * wanted).sum(), list(layer.parameters()))
    assert max(float(gradient.norm()) for gradient in gradients) > 0


@every_type
def test_a_layer_owns_its_tensors_and_leaves_the_weight_alone(kind):
    weight = torch.randn(40, 24)
    spectrum = decompose(weight)
    before = [t.clone() for t in (weight, *spectrum)]
    layer = ADAPTERS[kind].fresh(weight, SLICE, spectrum=spectrum, options=OPTIONS)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(5)
    assert all(torch.equal(*pair) for pair in zip(before, (weight, *spectrum), strict=True))
    assert not {id(weight), *map(id, spectrum)} & {id(t) for t in [*layer.parameters(), *layer.buffers()]}


@every_type
def test_equal_starts_are_equal_and_a_given_spectrum_changes_nothing(kind):
    weight = torch.randn(40, 24)
    one = ADAPTERS[kind].fresh(weight, SLICE, options=OPTIONS)
    torch.manual_seed(12345)
    two = ADAPTERS[kind].fresh(weight.clone(), SLICE, spectrum=decompose(weight), options=OPTIONS)
    assert all(torch.equal(*pair) for pair in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@every_type
def test_a_slice_that_does_not_fit_is_refused(kind):
    too_far = SpectralSlice.contiguous(6, 4)
    if ADAPTERS[kind].slice_of is None:
        assert ADAPTERS[kind].fresh(torch.randn(40, 24), too_far).delta().rank == 4
    else:
        with pytest.raises(SliceConflict, match=r"24-27 needs 28 .*has 24"):
            ADAPTERS[kind].fresh(torch.randn(40, 24), too_far, options=OPTIONS)


@every_type
def test_learning_rate_gains_name_every_parameter(kind):
    weight = torch.randn(64, 64)
    layer = ADAPTERS[kind].fresh(weight, SpectralSlice.contiguous(12, 4), options=OPTIONS)
    gains = layer.learning_rate_gains(decompose(weight, 4).S)
    assert gains.keys() == dict(layer.named_parameters()).keys()
    assert all(gain >= 1 for gain in gains.values())


@every_type
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_files_compute_in_float32(kind, dtype):
    layer = trained_layer(kind, torch.randn(40, 24))
    stored = ADAPTERS[kind].from_tensors({name: t.to(dtype) for name, t in layer.state_dict().items()})
    found = float32(stored).delta().dense()
    assert found.dtype == torch.float32
    assert (found - layer.delta().dense()).norm() < 16 * torch.finfo(dtype).eps * layer.delta().norm()
    assert float32(layer) is layer


@every_spectral_type
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.5])
def test_the_change_is_the_published_formula(kind, scale):
    layer = trained_layer(kind, torch.randn(40, 24), k=1, scale=scale)
    t = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    U, S, V = t["basis.U"], t["basis.S"], t["basis.V"]
    if kind in ("additive", "guarded"):
        after = (U + t["dU"]) @ (S + t["dS"]).diag() @ (V + t["dV"]).T
    elif kind == "rotational":
        after = U @ cayley(t["X_U"]) @ (S * (1 + t["dc"])).diag() @ (V @ cayley(t["X_V"])).T
    elif kind == "core":
        after = U @ (S.diag() + t["M"]) @ V.T
    else:
        after = U @ (S + t["dS"]).diag() @ V.T
    expected = after - U @ S.diag() @ V.T
    assert (layer.delta().dense().double() - expected).norm() <= 1e-5 * expected.norm()


@every_spectral_type
@pytest.mark.parametrize("dtype", HALVES)
def test_small_changes_survive_half_precision(kind, dtype):
    # The cancelling form (U + dU)(S + dS)(V + dV)ᵀ − USVᵀ errs by a third here.
    layer = trained_layer(kind, torch.randn(40, 24), scale=1e-4)
    expected = layer.delta().dense()
    factors = layer.delta().to(dtype=dtype)
    found = factors.up.double() @ factors.down.double()
    assert (found - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


def test_the_additive_change_accepts_a_single_direction_and_a_whole_spectrum():
    for rank in (1, 24):
        layer = trained_layer("additive", torch.randn(40, 24), rank=rank)
        t = layer.state_dict()
        U, S, V = t["basis.U"], t["basis.S"], t["basis.V"]
        expected = (U + t["dU"]) * (S + t["dS"]) @ (V + t["dV"]).T - U * S @ V.T
        assert torch.allclose(layer.delta().dense(), expected, atol=1e-4)
