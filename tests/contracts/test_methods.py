"""The contract of fusion methods, for every row of METHODS (law 8)."""

import itertools

import pytest
import torch

from fusion.methods import METHODS
from fusion.methods.method import LinearMethod
from fusion.spectral.delta import Delta
from trained import trained_layer

every_method = pytest.mark.parametrize("method", METHODS)
every_linear_method = pytest.mark.parametrize("method", [m for m, f in METHODS.items() if isinstance(f, LinearMethod)])


def three(shape=(20, 12)):
    weight = torch.randn(shape)
    return [trained_layer(kind, weight, k).delta().detach() for k, kind in enumerate(("additive", "lora", "core"))]


def dense(method, deltas, strengths):
    return METHODS[method]("unet.layer", deltas, strengths).dense()


@every_method
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_the_order_of_adapters_does_not_matter(method, shape):
    deltas, strengths = three(shape), (1.0, 0.5, -0.3)
    reference = dense(method, deltas, strengths)
    assert reference.shape == shape
    for order in itertools.permutations(range(3)):
        again = dense(method, [deltas[i] for i in order], [strengths[i] for i in order])
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
def test_one_adapter_alone_stays_itself(method):
    delta = three()[0]
    assert torch.allclose(dense(method, [delta], [1.0]), delta.dense(), atol=1e-6)


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
