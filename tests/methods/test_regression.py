"""Regression is the least-squares optimum it claims to be, in factors, and concepts may come one by one."""

import pytest
import torch

import fusion
import tiny
from fusion.composition.input_interference import merge_error
from fusion.errors import ConfigError
from fusion.methods import METHODS, MethodOptions
from fusion.models.input_moments import record_moments
from fusion.spectral.moments import Moment, Moments, response
from trained import trained_adapter, trained_layer

OUT, WIDTH, INPUTS = 20, 12, 30
OPTIONS = MethodOptions(neutral=0.5, ridge=1e-3)
STRENGTHS = (1.0, 0.5, -0.3)


@pytest.fixture
def inputs():
    """Of three concepts, and inputs that each should leave alone."""
    return torch.randn(2, 3, INPUTS, WIDTH, dtype=torch.float64) * torch.linspace(0.2, 2, WIDTH)


@pytest.fixture
def moments(inputs):
    own, free = inputs
    return [
        Moment(X.T @ X / INPUTS, Z.T @ Z / INPUTS, float(X.square().mean())) for X, Z in zip(own, free, strict=True)
    ]


@pytest.fixture
def deltas():
    weight = torch.randn(OUT, WIDTH)
    return [trained_layer(kind, weight, k).delta().detach() for k, kind in enumerate(("additive", "lora", "core"))]


def merged(method, deltas, moments, options=OPTIONS, strengths=STRENGTHS):
    return METHODS[method]("unet.layer", deltas, strengths, moments=moments, options=options)


def test_it_is_what_least_squares_on_all_inputs_gives(deltas, inputs, moments):
    own, free = inputs
    floor = sum(moment.floor for moment in moments)
    wanted = [X @ (s * d.dense().double()).T for X, d, s in zip(own, deltas, STRENGTHS, strict=True)]
    rows = [own.flatten(0, 1) / INPUTS**0.5, free.flatten(0, 1) * (OPTIONS.neutral / INPUTS) ** 0.5]
    rows += [torch.eye(WIDTH) * (OPTIONS.ridge * floor) ** 0.5]
    said = torch.cat([torch.cat(wanted) / INPUTS**0.5, torch.zeros(3 * INPUTS + WIDTH, OUT)])
    expected = torch.linalg.lstsq(torch.cat(rows), said).solution.T
    found = merged("regression", deltas, moments)
    assert found.rank == sum(delta.rank for delta in deltas)
    torch.testing.assert_close(found.dense().double(), expected, rtol=1e-4, atol=1e-5)


def test_the_original_by_gradients_reaches_the_same_optimum(deltas, moments):
    for options in (OPTIONS, MethodOptions(neutral=0.0, ridge=1e-6)):
        closed, descended = (merged(method, deltas, moments, options) for method in ("regression", "gradient"))
        torch.testing.assert_close(closed.dense(), descended.dense(), rtol=1e-3, atol=1e-4)


def test_inputs_of_different_concepts_that_never_meet_lose_nothing(deltas):
    """Where concepts live in orthogonal inputs, each keeps its whole effect; the sum would have talked across."""
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    apart = [Moment(Q @ Q.T, torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 1.0) for Q in axes.split(4, dim=1)]
    found = merged("regression", deltas, apart, MethodOptions(ridge=1e-9), (1.0, 1.0, 1.0))
    for delta, moment in zip(deltas, apart, strict=True):
        assert response(found + delta * -1.0, moment.own) < 1e-5 * response(delta, moment.own)


def test_more_weight_on_inputs_to_leave_alone_leaves_them_more_alone(deltas, moments):
    free = sum(moment.free for moment in moments)
    said = [
        float(response(merged("regression", deltas, moments, MethodOptions(neutral=weight)), free))
        for weight in (0.0, 0.1, 1.0, 10.0, 1e4)
    ]
    assert said == sorted(said, reverse=True) and said[-1] < 0.01 * said[0]


def normal_moments(parts):
    """The sums of the normal equations, as moments of what regression has made of `parts`."""
    summed = {}
    for part in parts:
        for layer, moment in part.layers.items():
            summed[layer] = summed.get(layer, 0) + moment.normal(OPTIONS.neutral, OPTIONS.ridge)
    layers = {layer: Moment(total, torch.zeros_like(total), 0.0) for layer, total in summed.items()}
    return Moments(layers, everywhere=any(part.everywhere for part in parts))


@pytest.mark.parametrize("gated", [True, False])
def test_one_by_one_equals_all_at_once(gated):
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, t, k=k, gated=gated) for k, t in enumerate(("<rex>", "<tom>", "<ann>"))]
    met = record_moments(pipe, adapters, steps=2)
    at_once = fusion.fuse(adapters, STRENGTHS, "regression", moments=met, options=OPTIONS)
    pair = fusion.fuse(adapters[:2], STRENGTHS[:2], "regression", moments=met[:2], options=OPTIONS)
    known = normal_moments(met[:2])  # nothing else is kept of the first two
    later = fusion.fuse(
        [pair, adapters[2]], [1.0, STRENGTHS[2]], "regression", moments=[known, met[2]], options=OPTIONS
    )
    for layer, delta in at_once.deltas().items():
        expected = delta.dense()
        assert (later.deltas()[layer].dense() - expected).norm() <= 1e-5 * expected.norm()


def test_the_pipeline_alone_is_enough_and_a_method_that_misses_it_says_so():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, token, k=k) for k, token in enumerate(("<rex>", "<tom>"))]
    fused = fusion.fuse(adapters, method="regression", pipe=pipe)
    met = record_moments(pipe, adapters)
    again = fusion.fuse(adapters, method="regression", moments=met)
    assert all(torch.equal(d.dense(), again.deltas()[n].dense()) for n, d in fused.deltas().items())
    with pytest.raises(ConfigError, match="needs a base: pass pipe="):
        fusion.fuse(adapters, method="regression")


def test_gated_concepts_merged_keep_most_of_themselves_and_touch_less_than_the_sum():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, token, k=k) for k, token in enumerate(("<rex>", "<tom>"))]
    met = record_moments(pipe, adapters)
    free = Moments({n: Moment(m.free, m.free, m.floor) for n, m in met[0].layers.items()})
    zero = fusion.fuse(adapters, [0.0, 0.0])

    def touched(adapter):
        return sum(float(response(d, free.layers[n].own) ** 2) for n, d in adapter.deltas().items())

    regression = fusion.fuse(adapters, method="regression", moments=met)
    total = fusion.fuse(adapters, rank=100)
    assert max(merge_error(regression, adapters, met)) < 1 == pytest.approx(max(merge_error(zero, adapters, met)))
    assert touched(regression) < 0.2 * touched(total)


def test_a_fused_adapter_is_taken_apart_and_its_concepts_keep_their_own_inputs():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, t, k=k) for k, t in enumerate(("<rex>", "<tom>", "<ann>"))]
    direct = fusion.fuse(adapters, method="regression", pipe=pipe)
    nested = fusion.fuse([fusion.fuse(adapters[:2]), adapters[2]], method="regression", pipe=pipe)
    for layer, delta in direct.deltas().items():
        torch.testing.assert_close(nested.deltas()[layer].dense(), delta.dense(), rtol=1e-4, atol=1e-5)
