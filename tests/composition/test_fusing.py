"""fuse: exact, closed, and refusing by name what cannot be fused."""

from dataclasses import replace

import pytest
import torch

import fusion
import tiny
from fusion.adapters.adapter import BaseInfo
from fusion.cli import main
from fusion.composition.compatibility_report import Forecast
from fusion.errors import BaseMismatch, ConfigError, GatingError, SliceConflict, TokenConflict, UnknownName
from fusion.methods import METHODS
from fusion.methods.method import AdapterMerge, LayerMerge, MethodOptions
from trained import attached, draw, trained_adapter

TOKENS = ("<rex>", "<tom>", "<ann>")


@pytest.fixture
def toy():
    return tiny.pipeline("sd1")


@pytest.fixture
def three(toy):
    return [trained_adapter(toy, token, k=k) for k, token in enumerate(TOKENS)]


def total(adapter, layer):
    return adapter.deltas()[layer].dense()


@pytest.mark.parametrize("gated", [True, False])
def test_direct_sum_is_the_sum_with_strengths(toy, gated):
    parts = [trained_adapter(toy, token, k=k, gated=gated) for k, token in enumerate(TOKENS)]
    fused = fusion.fuse(parts, strengths=[1.0, 0.5, -2.0])
    for layer in fused.layer_names:
        expected = total(parts[0], layer) + 0.5 * total(parts[1], layer) - 2 * total(parts[2], layer)
        torch.testing.assert_close(total(fused, layer), expected, rtol=1e-5, atol=1e-6)


def test_average_is_the_mean_of_the_merged_weights(toy, three):
    fused = fusion.fuse(three, method="average")
    for layer in fused.layer_names:
        weight = torch.randn(total(fused, layer).shape)
        mean = torch.stack([weight + total(adapter, layer) for adapter in three]).mean(dim=0)
        torch.testing.assert_close(weight + total(fused, layer), mean, rtol=1e-5, atol=1e-5)


def test_a_fused_adapter_draws_what_its_parts_draw_together_bit_by_bit(toy, three):
    prompt = "a photo of a <rex> and a <ann>"
    with attached(toy, *three):
        apart = draw(toy, prompt)
    with attached(toy, fusion.fuse(three)):
        assert torch.equal(draw(toy, prompt), apart)


def test_fusing_is_closed_and_does_not_depend_on_grouping(toy, three):
    at_once = fusion.fuse(three)
    in_steps = fusion.fuse([fusion.fuse(three[:2]), three[2]])
    for layer in at_once.layer_names:
        torch.testing.assert_close(total(at_once, layer), total(in_steps, layer))
    assert [c.token for c in in_steps.info.concepts] == list(TOKENS)
    assert in_steps.slices == at_once.slices
    with attached(toy, at_once):
        one = draw(toy, "a <tom>")
    with attached(toy, in_steps):
        assert torch.equal(one, draw(toy, "a <tom>"))


def test_one_adapter_fused_alone_is_itself(three):
    alone = fusion.fuse(three[:1])
    assert all(torch.equal(total(alone, n), total(three[0], n)) for n in three[0].layer_names)


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_of_all_changes_nothing(toy, three, method):
    fused = fusion.fuse(three, strengths=[0, 0, 0], method=method, pipe=toy)
    assert all(not total(fused, layer).any() for layer in fused.layer_names)


def test_compression_keeps_rank_and_says_that_gates_are_lost(three, caplog):
    small = fusion.fuse(three, rank=5)
    assert max(delta.rank for delta in small.deltas().values()) == 5
    assert not small.gated and "cannot be gated" in caplog.text
    full = fusion.fuse(three, energy=1.0)
    for layer in full.layer_names:
        torch.testing.assert_close(total(full, layer), total(fusion.fuse(three), layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"energy": 0.0}, {"energy": float("nan")}])
def test_a_senseless_compression_is_refused_before_anything_is_merged(three, wrong):
    with pytest.raises(ConfigError, match="rank should be at least 1 and energy above 0"):
        fusion.fuse(three, **wrong)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1001.0])
def test_strengths_are_bounded_numbers(toy, three, wrong):
    one = three[0]
    with pytest.raises(ConfigError, match="A strength is a number from -1000 to 1000"):
        fusion.fuse([one], [wrong])
    with pytest.raises(ConfigError, match="A strength is a number from -1000 to 1000"):
        fusion.generate(toy, "a dog", [one], strengths=[wrong])
    with (
        fusion.attach(toy, one) as handle,
        pytest.raises(ConfigError, match="A strength is a number from -1000 to 1000"),
    ):
        handle.strength(one.info.name, wrong)


def test_overlapping_slices_are_refused_by_both_names(toy):
    same = [trained_adapter(toy, token, k=1, gated=False) for token in ("<rex>", "<tom>")]
    with pytest.raises(SliceConflict, match=r"'rex' and 'tom' both use directions 4-7 in \d+ layers"):
        fusion.fuse(same)
    assert fusion.compatibility(same).verdict == "refused"
    assert len(fusion.fuse(same, allow_overlap=True).branches) == 2
    assert fusion.fuse(same, method="average")


def test_slices_of_different_kinds_do_not_collide(toy):
    fusion.fuse([trained_adapter(toy, "<rex>"), trained_adapter(toy, "<tom>", kind="orthogonal")])
    fusion.fuse([trained_adapter(toy, "<rex>", kind="lora"), trained_adapter(toy, "<tom>", kind="lora")])


def test_one_token_twice_is_refused_and_can_be_renamed(toy):
    twins = [trained_adapter(toy, "<rex>", k=0), trained_adapter(toy, "<rex>", k=1)]
    with pytest.raises(TokenConflict, match="rename"):
        fusion.fuse(twins)
    fused = fusion.fuse([twins[0], twins[1].renamed({"<rex>": "<rex-2>"})])
    assert [concept.token for concept in fused.info.concepts] == ["<rex>", "<rex-2>"]


def test_adapters_of_different_families_are_refused_by_name(three):
    stranger = replace(three[1], info=replace(three[1].info, base=BaseInfo("sdxl", "other", "epsilon")))
    with pytest.raises(BaseMismatch, match=r"'rex'.*'tom'"):
        fusion.fuse([three[0], stranger])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda a: fusion.fuse([]), ConfigError),
        (lambda a: fusion.fuse(a, strengths=[1.0]), ConfigError),
        (lambda a: fusion.fuse(a, method="direct_som"), UnknownName),
        (lambda a: fusion.fuse(a, gating="token"), ConfigError),
    ],
)
def test_mistakes_are_named(three, call, error):
    with pytest.raises(error):
        call(three)


def test_gates_can_be_dropped_and_given(toy):
    ungated = trained_adapter(toy, "<rex>", gated=False)
    assert fusion.fuse([ungated], gating="tokens").gated
    assert not fusion.fuse([trained_adapter(toy, "<tom>")], gating="none").gated
    with pytest.raises(GatingError):
        bare = replace(ungated, info=replace(ungated.info, concepts=()), tokens={})
        fusion.fuse([bare], gating="tokens")


def test_compatibility_tells_before_fusing_what_fusing_will_say(toy, three):
    good = fusion.compatibility(three, toy)
    assert good.verdict == "compatible" and "3 adapters" in good.sentence
    loose = fusion.compatibility([three[0], trained_adapter(toy, "<tom>", k=1, gated=False)])
    assert loose.verdict == "caution" and loose.advice
    foreign = fusion.compatibility(three, tiny.pipeline("sd1", seed=5))
    assert foreign.verdict == "refused" and "does not fit this base" in foreign.sentence
    twins = fusion.compatibility([three[0], three[0]])
    assert twins.verdict == "refused"


def test_interference_is_what_dense_matrices_say(three):
    measured = fusion.interference(three)
    first, second = (torch.cat([total(a, n).flatten() for n in a.layer_names]).double() for a in three[:2])
    expected = torch.dot(first, second) / first.norm() / second.norm()
    assert measured.cosine[0][1] == pytest.approx(float(expected), abs=1e-6)
    layer = three[0].layer_names[0]
    one, two = total(three[0], layer).double(), total(three[1], layer).double()
    assert measured.by_layer[layer][1][0] == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), abs=1e-6)
    whole = sum(torch.cat([total(a, n).flatten() for n in a.layer_names]).double() for a in three)
    assert measured.retention[0] == pytest.approx(float(torch.dot(whole, first) / first.dot(first)), rel=1e-5)
    norms = [torch.cat([total(a, n).flatten() for n in a.layer_names]).double().norm() for a in three]
    assert measured.energy_ratio == pytest.approx(float(whole.norm() / max(norms)), rel=1e-5)


def test_a_planted_collision_is_named_with_pair_and_layer(toy):
    one, two = trained_adapter(toy, "<rex>", k=0, gated=False), trained_adapter(toy, "<tom>", k=1, gated=False)
    layer = one.layer_names[3]
    layers = {**two.layers, layer: one.layers[layer]}
    planted = replace(two, branches=(replace(two.branches[0], layers=layers),))
    worst = fusion.interference([one, planted]).worst(1)[0]
    assert worst[0] == layer and {worst[1], worst[2]} == {"rex", "tom"} and worst[3] == pytest.approx(1.0)
    assert layer in " ".join(fusion.compatibility([one, planted]).problems)


def test_overlaps_of_directions_are_in_interference_alone(three):
    """Compatibility shows none, and would pay an SVD for each layer and pair."""
    measured = fusion.interference(three)
    assert measured.column_overlap[0][0] == 1 and 0 <= measured.row_overlap[1][0] < 1
    report = fusion.compatibility(three).interference
    assert report == replace(measured, column_overlap=[], row_overlap=[])


def test_compatibility_accepts_the_former_keyword_with_one_warning(three):
    forecast = Forecast(["<rex>", "<tom>"], [[None, 0.5], [0.0, None]])
    with pytest.warns(FutureWarning, match="forecast=") as warned:
        former = fusion.compatibility(three, foresight=forecast)
    assert len(warned) == 1 and former == fusion.compatibility(three, forecast=forecast)
    assert former.problems == [
        "<tom> will lose about 50% of what distinguishes it from its noun to <rex>, by the first denoising step."
    ]


def test_a_fused_adapter_is_taken_apart_when_measured(three):
    assert fusion.interference([fusion.fuse(three)]).names == ["rex", "tom", "ann"]


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if not isinstance(row, AdapterMerge)])
def test_imported_loras_take_part_in_every_method(toy, method, tmp_path, caplog):
    own = trained_adapter(toy, "<rex>", scale=0.1)
    fusion.export(trained_adapter(toy, "<tom>", k=1, gated=False, scale=0.1), tmp_path / "style.safetensors", "kohya")
    style = fusion.load(tmp_path / "style.safetensors")
    assert not style.info.concepts and not style.gated
    fused = fusion.fuse([own, style], method=method, pipe=toy, options=MethodOptions(iterations=10))
    assert set(fused.layer_names) == {*own.layer_names, *style.layer_names}
    assert all(delta.dense().isfinite().all() and delta.dense().any() for delta in fused.deltas().values())
    fusion.save(fused, tmp_path / "fused.safetensors")
    with attached(toy, fusion.load(tmp_path / "fused.safetensors")):
        assert draw(toy, "a photo of a <rex>").isfinite().all()


def test_energy_balanced_is_as_large_as_its_strongest_part_and_keeps_branches_and_gates(three):
    fused = fusion.fuse(three, [1.0, 0.5, 0.2], "energy_balanced")
    assert fused.gated and [branch.type for branch in fused.branches] == ["additive"] * 3

    def size(adapter):
        return float(torch.cat([total(adapter, n).flatten() for n in adapter.layer_names]).norm())

    strongest = max(s * size(adapter) for s, adapter in zip([1.0, 0.5, 0.2], three, strict=True))
    assert size(fused) == pytest.approx(strongest, rel=1e-5)
    merged = fusion.fuse(three, [1.0, 0.5, 0.2], "energy_balanced", energy=1.0)
    for layer in fused.layer_names:
        torch.testing.assert_close(total(merged, layer), total(fused, layer), rtol=1e-4, atol=1e-5)


def test_a_method_of_ones_own_is_one_file_and_one_line(three, monkeypatch, capsys):
    def merge(deltas, strengths, context):
        return deltas[0] * strengths[0]

    monkeypatch.setitem(METHODS, "toy", LayerMerge(merge, "keeps the first", linear=True))
    fused = fusion.fuse(three, [2.0, 1.0, 1.0], method="toy")
    for layer in three[0].layer_names:
        torch.testing.assert_close(total(fused, layer), 2 * total(three[0], layer))
    assert main(["fuse", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "toy" in shown and "keeps the first" in shown
