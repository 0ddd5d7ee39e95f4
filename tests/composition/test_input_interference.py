"""Measures in activation space are what multiplying the inputs directly gives."""

from dataclasses import replace

import pytest
import torch

import fusion
import tiny
from fusion.composition.compatibility_report import MAX_CROSS_TALK
from fusion.composition.input_interference import cross_talk, merge_error
from fusion.errors import ConfigError
from fusion.methods import METHODS, MethodOptions
from fusion.methods.method import AdapterMerge
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts
from fusion.models.input_moments import record_moments
from fusion.models.layer_sites import matrix, sites
from fusion.spectral.moments import response
from trained import fresh_adapter, trained_adapter

TOKENS = ("<rex>", "<tom>")
FREE = ("a dog in the snow", "a cat")


@pytest.fixture(scope="module")
def toy():
    return tiny.pipeline("sd1")


@pytest.fixture(scope="module")
def pair(toy):
    torch.manual_seed(0)
    kinds = {"targets": ["text_encoder"], "gated": False}
    return [trained_adapter(toy, token, k=k, scale=0.1, **kinds) for k, token in enumerate(TOKENS)]


@pytest.fixture(scope="module")
def met(toy, pair):
    return record_moments(toy, pair, prompts=["a {token}", "a {token} in the snow"], concept_free=FREE)


def inputs(pipe, adapter, prompts, strength=1.0):
    """Layer name -> X (n, I), one input a row, of all layers of the text encoder."""
    heard: dict[str, list[torch.Tensor]] = {}
    with attach(pipe, adapter) as handle:
        handle.strength(adapter.info.name, strength)
        hooks = [
            sites(pipe)[n].module.register_forward_pre_hook(
                lambda _, args, n=n: heard.setdefault(n, []).append(args[0].double().flatten(0, 1))
            )
            for n in adapter.layer_names
        ]
        with torch.no_grad():
            encode_prompts(pipe, prompts)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in heard.items()}


def size(change, X):
    """‖ΔW X‖ over all layers."""
    return torch.cat([(X[n] @ change[n].T).flatten() for n in X]).norm()


@pytest.fixture(scope="module")
def own(toy, pair):
    return [inputs(toy, a, [f"a {t}", f"a {t} in the snow"]) for a, t in zip(pair, TOKENS, strict=True)]


def dense(adapter):
    return {name: delta.dense().double() for name, delta in adapter.deltas().items()}


def test_cross_talk_is_the_ratio_of_responses(toy, pair, met, own):
    found = cross_talk(toy, pair, met)
    one, two = (dense(adapter) for adapter in pair)
    assert found.ratio[0][1] == pytest.approx(float(size(one, own[1]) / size(two, own[1])), rel=1e-4)
    assert found.ratio[1][0] == pytest.approx(float(size(two, own[0]) / size(one, own[0])), rel=1e-4)
    assert found.ratio[0][0] == found.ratio[1][1] == 1.0
    layer = pair[0].layer_names[2]
    expected = size({layer: one[layer]}, {layer: own[1][layer]}) / size({layer: two[layer]}, {layer: own[1][layer]})
    assert found.by_layer[layer][0][1] == pytest.approx(float(expected), rel=1e-4)
    assert found.worst(1)[0][3] == max(m[i][1 - i] for m in found.by_layer.values() for i in (0, 1))


def test_drift_is_measured_on_prompts_without_the_concept_against_what_the_base_says(toy, pair, met):
    nouns = ["a dog"]
    free = inputs(toy, pair[0], [*FREE, *nouns], strength=0.0)
    base = {name: matrix(sites(toy)[name]).double() for name in free}
    expected = size(dense(pair[0]), free) / size(base, free)
    assert cross_talk(toy, pair, met).drift[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("method", ["direct_sum", "average", "regression", "ties", "knots"])
def test_merge_error_is_how_far_off_the_fused_change_is(toy, pair, met, own, method):
    fused = fusion.fuse(pair, method=method, moments=met)
    whole = dense(fused)
    for error, adapter, X in zip(merge_error(fused, pair, met), pair, own, strict=True):
        alone = dense(adapter)
        expected = size({n: whole[n] - alone[n] for n in whole}, X) / size(alone, X)
        assert error == pytest.approx(float(expected), rel=1e-3)


def test_merge_error_is_0_alone_1_without_and_regression_has_the_least(toy, pair, met):
    assert merge_error(pair[0], pair[:1], met[:1]) == pytest.approx([0], abs=1e-6)
    assert merge_error(fusion.fuse(pair, [0, 0]), pair, met) == pytest.approx([1, 1])
    sizes = [
        sum(float(response(delta, m.layers[n].own) ** 2) for n, delta in adapter.deltas().items())
        for adapter, m in zip(pair, met, strict=True)
    ]
    options, total = MethodOptions(neutral=0.0, ridge=1e-9), {}
    for method in (m for m, row in METHODS.items() if not isinstance(row, AdapterMerge)):
        errors = merge_error(fusion.fuse(pair, method=method, moments=met, options=options), pair, met)
        total[method] = sum(error**2 * size for error, size in zip(errors, sizes, strict=True))
    assert total["regression"] == pytest.approx(total.pop("gradient"), rel=1e-3)
    assert min(total, key=total.get) == "regression"


def test_moments_must_belong_to_the_adapters(toy, pair, met):
    with pytest.raises(ConfigError):
        cross_talk(toy, pair, met[:1])
    with pytest.raises(ConfigError, match="'rex' and 'tom'"):
        fusion.fuse(pair, method="regression", moments=met[:1])


def test_compatibility_listens_where_it_is_given_moments(toy, pair, met):
    talk = cross_talk(toy, pair, met)
    told = fusion.compatibility(pair, toy, met)
    assert told.cross_talk == talk and fusion.compatibility(pair, toy).cross_talk is None
    loudest = max((talk.ratio[i][1 - i], i) for i in (0, 1))
    assert loudest[0] >= MAX_CROSS_TALK and told.verdict == "caution"
    names = [adapter.info.name for adapter in pair]
    said = next(problem for problem in told.problems if f"{loudest[0]:.2f} times as much" in problem)
    layer = max(talk.by_layer, key=lambda name: talk.by_layer[name][loudest[1]][1 - loudest[1]])
    assert said.startswith(f"'{names[loudest[1]]}'") and said.endswith(f"most at {layer}.")
    with pytest.raises(ConfigError, match="its pipeline too"):
        fusion.compatibility(pair, moments=met)


def test_a_planted_disturbance_is_named_with_pair_and_layer(toy, pair, met):
    """One adapter is made silent but for one layer: that is the layer to be named, with who talks into whom."""
    layer, (one, two) = pair[0].layer_names[1], pair
    silent = fresh_adapter(toy, TOKENS[0], targets=["text_encoder"], gated=False).layers
    planted = replace(
        one, branches=(replace(one.branches[0], layers={**silent, layer: one.layers[layer]}, strength=30.0),)
    )
    first = fusion.compatibility([planted, two], toy, met).problems[-2:]
    into = [sentence for sentence in first if f"'{one.info.name}' changes" in sentence]
    assert len(into) == 1 and f"as much as '{two.info.name}' itself" in into[0] and into[0].endswith(f"{layer}.")


def test_gated_adapters_are_not_said_to_disturb(toy):
    gated = [trained_adapter(toy, token, k=k, scale=0.1, targets=["text_encoder"]) for k, token in enumerate(TOKENS)]
    told = fusion.compatibility(gated, toy, record_moments(toy, gated, prompts=["a {token}"], concept_free=FREE))
    assert told.verdict == "compatible" and told.cross_talk is not None
