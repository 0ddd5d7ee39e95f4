"""The contract of fusion methods, for every row of METHODS (law 8)."""

import itertools

import pytest
import torch

from fusion.errors import ConfigError
from fusion.methods import METHODS
from fusion.methods.method import AdapterMerge, MethodOptions
from fusion.spectral.delta import Delta
from fusion.spectral.moments import Moment
from trained import trained_layer

# Methods that work on whole adapters have their contract in tests/distillation.
LAYERWISE = [method for method, row in METHODS.items() if not isinstance(row, AdapterMerge)]
every_method = pytest.mark.parametrize("method", LAYERWISE)
every_linear_method = pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.linear])
OPTIONS = MethodOptions(ridge=1e-9)


def three(shape=(20, 12)):
    weight = torch.randn(shape)
    return [trained_layer(kind, weight, k).delta().detach() for k, kind in enumerate(("additive", "lora", "core"))]


def moment(width, seed, free=1.0):
    """Of 40 inputs in uneven directions, and 40 others."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 3, width, dtype=torch.float64)
    own, other = (torch.randn(40, width, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return Moment(own.T @ own / 40, free * other.T @ other / 40, float(own.square().mean()))


def dense(method, deltas, strengths, moments=None, options=OPTIONS):
    given = moments or [moment(deltas[0].shape[1], i) for i in range(len(deltas))]
    return METHODS[method]("unet.layer", deltas, strengths, moments=given, options=options).dense()


@every_method
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_the_order_of_adapters_does_not_matter(method, shape):
    deltas, strengths, moments = three(shape), (1.0, 0.5, -0.3), [moment(shape[1], i) for i in range(3)]
    reference = dense(method, deltas, strengths, moments)
    assert reference.shape == shape
    for order in itertools.permutations(range(3)):
        again = dense(method, *([values[i] for i in order] for values in (deltas, strengths, moments)))
        assert (again - reference).norm() <= 1e-6 * reference.norm()


@every_method
def test_equal_inputs_give_equal_bits(method):
    deltas = three()
    copies = [Delta(delta.up.clone(), delta.down.clone()) for delta in deltas]
    assert torch.equal(dense(method, deltas, (1.0, 0.7, 2.0)), dense(method, copies, (1.0, 0.7, 2.0)))


@every_method
def test_inputs_are_left_alone(method):
    deltas = three()
    before = [delta.dense().clone() for delta in deltas]
    dense(method, deltas, (1.0, 0.7, 2.0))
    assert all(torch.equal(delta.dense(), b) for delta, b in zip(deltas, before, strict=True))


@every_method
def test_one_adapter_alone_stays_itself_where_nothing_is_dropped_or_to_be_left_alone(method):
    delta, alone, whole = three()[0], [moment(12, 0, free=0.0)], MethodOptions(density=1.0, ridge=1e-9)
    assert torch.allclose(dense(method, [delta], [1.0], alone, whole), delta.dense(), atol=1e-6)


@every_method
def test_strengths_of_zero_and_adapters_without_changes_change_nothing(method):
    assert not dense(method, three(), [0.0] * 3).any()
    assert not dense(method, [Delta.zero(20, 12)] * 2, [1.0, 0.5]).any()


@every_method
def test_an_adapter_of_strength_zero_takes_no_part_where_the_table_says_so(method):
    deltas, moments = three(), [moment(12, i) for i in range(3)]
    with_it = dense(method, deltas, [1.0, 0.5, 0.0], moments)
    without = dense(method, deltas[:2], [1.0, 0.5], moments[:2])
    assert torch.allclose(with_it, without, atol=1e-6) is not METHODS[method].idle_counts


@every_method
def test_an_adapter_that_leaves_the_layer_alone_may_take_part(method):
    deltas = [*three(), Delta.zero(20, 12)]
    assert dense(method, deltas, [1.0] * 4).isfinite().all()


def test_what_is_dropped_depends_on_the_seed_and_the_layer_alone():
    deltas, strengths, row = three(), (1.0, 0.5, 0.3), METHODS["dare"]
    state = torch.random.get_rng_state()
    first = row("unet.layer", deltas, strengths).dense()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first, row("unet.other", deltas, strengths).dense())
    assert not torch.equal(first, row("unet.layer", deltas, strengths, options=MethodOptions(seed=1)).dense())


@pytest.mark.parametrize("wrong", [{"density": 0.0}, {"density": 1.5}, {"ridge": 0.0}, {"neutral": -1.0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        MethodOptions(**wrong)


@every_linear_method
def test_linear_methods_are_linear_in_strength_and_change(method):
    deltas, one, two = three(), torch.tensor([1.0, 0.5, -2.0]), torch.tensor([0.3, -1.0, 0.1])
    joint = dense(method, deltas, (2 * one + two).tolist())
    apart = 2 * dense(method, deltas, one.tolist()) + dense(method, deltas, two.tolist())
    assert torch.allclose(joint, apart, atol=1e-5)
    tripled = dense(method, [delta * 3.0 for delta in deltas], one.tolist())
    assert torch.allclose(tripled, 3 * dense(method, deltas, one.tolist()), atol=1e-5)


def test_a_zero_adapter_is_neutral_for_the_direct_sum():
    deltas = three()
    for zero in (Delta.zero(20, 12), deltas[0] * 0.0):
        assert torch.equal(dense("direct_sum", [*deltas, zero], [1.0] * 4), dense("direct_sum", deltas, [1.0] * 3))
    assert torch.equal(dense("direct_sum", deltas, [1.0, 1.0, 0.0]), dense("direct_sum", deltas[:2], [1.0] * 2))


def test_the_average_is_the_mean_of_the_merged_weights():
    weight, deltas = torch.randn(20, 12), three()
    merged = torch.stack([weight + delta.dense() for delta in deltas])
    found = weight + dense("average", deltas, [1.0] * 3)
    assert (found - merged.mean(dim=0)).norm() <= 1e-6 * merged.mean(dim=0).norm()
