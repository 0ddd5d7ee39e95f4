"""The judge in pictures: known pictures get known verdicts, and every control scores as it must."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fusion
import tiny
from fusion.errors import BaseMismatch, ConfigError
from fusion.evaluation import identity
from fusion.evaluation.clip_judge import open_judge, reliability, similarity
from fusion.evaluation.identity import Scene, crop, measure_identity, share
from trained import trained_adapter

COLOURS = {"<red>": (220, 30, 30), "<blue>": (30, 60, 220), "<green>": (30, 200, 60)}
NOUN = (128, 128, 128)
NOUNS = dict.fromkeys(COLOURS, "thing")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tiny.save_judge(folder)
    return open_judge(folder, device="cpu")


def patch(colour, seed, size=(32, 32)):
    """A noisy patch of one colour."""
    noise = np.random.default_rng(seed).normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def references():
    return {token: [patch(colour, seed) for seed in range(4)] for token, colour in COLOURS.items()}


def drawn(shows, prompt, seed):
    """A picture of what stands in the prompt, in its places; `shows` tells which colour each word really gives."""
    words = [w for w in prompt.split() if w in shows]
    picture = Image.new("RGB", (64, 32))
    for i, word in enumerate((words * 2)[:2]):
        picture.paste(patch(shows[word], seed + 100 * i), (32 * i, 0))
    return picture


def scene(together):
    """A base that draws grey things, adapters that each draw their own colour, and `together` as given."""
    grey = {"thing": NOUN}
    alone = {token: partial(drawn, {token: colour, **grey}) for token, colour in COLOURS.items()}
    return Scene(partial(drawn, grey), alone, partial(drawn, {**together, **grey}), NOUNS)


def test_a_perfect_fusion_loses_nothing(judge):
    identity = measure_identity(scene(COLOURS), judge, references(), seeds=range(3))
    assert identity.reliability == 1 and identity.omission == 0 and identity.redundancy == 0
    assert all(abs(part.mean - 1) < 0.1 for part in [*identity.retention, *identity.pair_retention])
    assert all(high > low + 0.02 for high, low in zip(identity.alone, identity.floor, strict=True))
    matrix = torch.tensor(identity.matrix)
    assert (matrix.argmax(dim=1) == torch.arange(3)).all()


def test_a_fusion_that_draws_nothing_of_the_concepts_keeps_nothing(judge):
    identity = measure_identity(scene(dict.fromkeys(COLOURS, NOUN)), judge, references(), seeds=range(3))
    assert (
        all(abs(part.mean) < 0.1 for part in [*identity.retention, *identity.pair_retention]) and identity.omission == 1
    )


def test_of_a_concept_that_its_own_adapter_does_not_draw_no_share_is_given(judge):
    nothing = scene(dict.fromkeys(COLOURS, NOUN))
    nothing = replace(nothing, alone=dict.fromkeys(COLOURS, nothing.together))
    identity = measure_identity(nothing, judge, references(), seeds=range(2))
    assert [str(part) for part in identity.retention] == ["–"] * 3


def test_swapped_names_are_noticed(judge):
    swapped = {"<red>": COLOURS["<blue>"], "<blue>": COLOURS["<red>"], "<green>": COLOURS["<green>"]}
    identity = measure_identity(scene(swapped), judge, references(), seeds=range(3))
    assert identity.omission >= 0.5 and identity.redundancy >= 0.5
    leakage, tokens = torch.tensor(identity.leakage), identity.tokens
    assert leakage[tokens.index("<red>")].argmax() == tokens.index("<blue>")
    assert identity.retention[2].mean > 0.9 > max(identity.retention[0].mean, identity.retention[1].mean)


def test_one_concept_everywhere_leaks_into_the_others(judge):
    identity = measure_identity(scene(dict.fromkeys(COLOURS, COLOURS["<red>"])), judge, references(), seeds=range(3))
    leakage = torch.tensor(identity.leakage)
    assert (leakage[1:, 0] > 0.02).all() and (leakage[1:, 0] > leakage[0, 1:].max()).all()


def test_shuffled_references_make_the_judge_unreliable(judge):
    mixed = {t: [patch(c, i) for i, c in enumerate(COLOURS.values())] for t in COLOURS}
    assert reliability([judge.pictures(pictures) for pictures in mixed.values()]) < 0.5
    assert reliability([judge.pictures(pictures) for pictures in references().values()]) == 1


def test_similarity_is_a_mean_of_cosines(judge):
    rows = judge.pictures([patch(c, 0) for c in COLOURS.values()])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(
        similarity(rows, [rows[:1], rows[1:]])[0], torch.stack([rows[0] @ rows[0], (rows[1:] @ rows[0]).mean()])
    )
    assert judge.texts(["a dog", "a cat in the snow and the snow and the snow and the snow"]).shape == rows[:2].shape


def test_shares_have_intervals():
    steady, wild = share(torch.full((5,), 0.7)), share(torch.tensor([0.0, 1.0] * 8))
    assert steady.low == steady.high == pytest.approx(0.7)
    assert 0 < wild.low < wild.mean < wild.high < 1 and share(torch.tensor([0.0, 1.0] * 8)) == wild


def test_crops_are_shares_of_the_picture():
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 0, 0), (32, 0, 64, 32))
    half = crop(picture, (0.5, 0, 1, 1))
    assert half.size == (32, 32) and half.getcolors() == [(32 * 32, (255, 0, 0))]


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_evaluate_draws_and_judges(judge, monkeypatch):
    monkeypatch.setattr(identity, "MIN_EFFECT", -1.0)  # toys draw nothing that a judge could recognise
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    own = {"<rex>": [patch((200, 0, 0), 0)], "<tom>": [patch((0, 0, 200), 0)]}
    more = {"prompts": ["a {token}"], "concept_free": ["a dog"], "seeds": 2}
    more["scenes"] = ("a {first}", "{first} beside {second}")
    calls = []
    report = fusion.evaluate(
        pipe,
        adapters,
        references=own,
        judge=judge,
        num_inference_steps=2,
        on_progress=lambda *c: calls.append(c),
        **more,
    )
    assert calls == [(number, 24) for number in range(24)]  # every picture, counted before it is drawn
    measured = report.identity
    assert measured and measured.tokens == ["<rex>", "<tom>"]
    # Gates are exact, so a concept on its own is drawn together as alone: nothing can be lost.
    assert all(part.mean == pytest.approx(1, abs=1e-3) for part in measured.retention)
    assert "retention in pairs" in report.to_markdown() and report.to_json()["identity"]["judge"] == judge.name
    monkeypatch.setattr(identity, "MIN_EFFECT", 1.0)
    again = fusion.evaluate(pipe, adapters, references=own, judge=judge, num_inference_steps=2, **{**more, "seeds": 1})
    assert json.loads(json.dumps(again.to_json(), allow_nan=False))["identity"]["retention"][0]["mean"] is None
    for wrong, said in (({"<max>": own["<rex>"]}, "No adapter knows <max>"), ({"<rex>": []}, "one or more of each")):
        with pytest.raises(ConfigError, match=said):
            fusion.evaluate(pipe, adapters, references=wrong, judge=judge, **more)


def test_what_is_no_judge_is_refused(tmp_path):
    with pytest.raises(BaseMismatch, match="could not be opened as a CLIP model"):
        open_judge(tmp_path)


@pytest.mark.slow
def test_the_embedded_judge_tells_the_example_concepts_apart_and_knows_subjects_by_name():
    seeing, root = open_judge(device="cpu"), Path(__file__).parents[2]
    folders = sorted((root / "assets" / "concepts").iterdir())
    shown = [[Image.open(file) for file in sorted(folder.glob("*.png"))[:4]] for folder in folders]
    assert len(folders) == 5 and reliability([seeing.pictures(pictures) for pictures in shown]) == 1
    names = ("pizza", "fox", "house", "guitar", "umbrella", "ghost", "banana", "rocket")
    pipe = fusion.open_pipeline(device="cpu")
    configs = [
        fusion.GenerationConfig(prompt=f"a {name} on a blue background", num_inference_steps=6) for name in names
    ]
    drawn = [fusion.generate(pipe, config)[0].image for config in configs]
    cosines = seeing.pictures(drawn) @ seeing.texts([f"a {name}" for name in names]).T
    assert (cosines.argmax(dim=1) == torch.arange(len(names))).all()
