"""The fusion laboratory at toy size: every part of it, a method of one's own, and cells that are made once."""

import re
from dataclasses import replace

import pytest

import fusion
import tiny
from benchmarks.laboratory import __main__ as run
from benchmarks.laboratory import plan, prediction, report, schedule
from benchmarks.laboratory.arms import arms
from benchmarks.laboratory.concepts import ALONE, NAMES, concepts
from benchmarks.laboratory.scoring import Laboratory, Prompts
from benchmarks.laboratory.store import Busy, Missing, Store
from benchmarks.laboratory.trainer import Size, Trainer
from fusion.methods.method import LayerMerge


def halved(deltas, strengths, context):
    """A method of one's own: half of the sum."""
    return sum((delta * (0.5 * strength) for delta, strength in zip(deltas[1:], strengths[1:], strict=True)),
               start=deltas[0] * (0.5 * strengths[0]))  # fmt: skip


@pytest.fixture
def laboratory(tmp_path):
    pipe = tiny.pipeline("sd1")  # with room for the concepts' captions, spelled in letters
    pipe.tokenizer, pipe.text_encoder.config.max_position_embeddings = tiny.tokenizer(length=77), 77
    pipe.text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config)
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "fusion.toml").write_text("[generation]\nsteps = 2\n[training]\nresolution = 16\n")
    tiny.save_judge(tmp_path / "judge")
    store = Store(tmp_path / "store", wait=False)
    small = {"max_train_steps": 2, "train_batch_size": 4, "rank": 2}
    trainer = Trainer(store, Size(2, 2, 2), tmp_path / "base", "cpu", small)
    prompts = Prompts("a {first}", "{first} and {second}", ("dog",), ("a dog", "a cat"))  # short as the toys are
    return Laboratory(store, trainer, tmp_path / "judge", range(2), prompts)


@pytest.mark.slow
def test_a_method_in_one_file_gets_its_row(laboratory, monkeypatch, tmp_path):
    monkeypatch.setitem(fusion.METHODS, "halved", LayerMerge(halved, "half of the sum"))
    monkeypatch.setattr("fusion.evaluation.identity.MIN_EFFECT", -1.0)  # a toy draws nothing that the judge recognises
    for name, count in (("HELD_OUT", 8), ("SCALE_PROMPTS", 4)):
        monkeypatch.setattr(f"fusion.distillation.loop.{name}", count)
    names = plan.UNLIKE[:2]
    names_of_arms = ("spectral", "spectral, places found", "lora, halved", "lora, switch", "lora, composite")
    names_of_arms += ("spectral-gated-quiet, distilled", plan.EACH_ALONE, "plain-lora, bound, styled")
    assert set(names_of_arms) <= arms().keys()
    rows = [*(plan.Row(arm, names) for arm in names_of_arms), plan.Row("spectral", names[:1], pairs=False)]
    rows.append(plan.Row("spectral-gated-quiet, distilled", names[:1], pairs=False))
    small = replace(plan.QUICK, size=laboratory.trainer.size, rows=rows, ranks=(1,))
    schedule.work(schedule.tasks(laboratory, small, None))
    made = {path: path.stat().st_mtime_ns for path in laboratory.store.folder.rglob("*.*")}
    text = report.write(laboratory, small, tmp_path / "bench.md")
    assert "| plain-lora, bound, styled | " in text.partition("## Plain LoRAs of two concepts")[2]
    assert "| lora, halved | " in text and text == (tmp_path / "bench.md").read_text()
    assert all((tmp_path / f"fusion-bench-{name}.png").stat().st_size > 1000 for name in ("matrices", "distilled"))
    section = text.partition("## Distilled into plain LoRAs")[2].partition("##")[0]
    assert re.findall(r"^\| (\d) \| ([^|]+) \|", section, flags=re.MULTILINE) == [
        ("2", "spectral-gated-quiet, distilled"),
        ("2", plan.EACH_ALONE),
        ("1", "spectral-gated-quiet, distilled"),
    ]
    assert re.search(rf"^\| 2 \| {plan.EACH_ALONE} .*\| 2 × \d+\.\d \| 2 × \d", section, flags=re.MULTILINE)
    schedule.work(schedule.tasks(laboratory, small, None))  # and nothing is made twice
    assert {p: p.stat().st_mtime_ns for p in laboratory.store.folder.rglob("*.*") if p in made} == made

    laboratory.store.make = False
    more = replace(small, rows=[*rows, plan.Row("orthogonal", names)])
    assert report.write(laboratory, more, None).endswith("Not measured yet: orthogonal with 2 concepts.\n")

    score = laboratory.score("spectral", concepts(names))
    assert score["drift"] == pytest.approx(0, abs=1e-6) and score["error"] == [0, 0]  # gates are exact
    assert [share["mean"] for share in score["identity"]["retention"]] == pytest.approx([1, 1], abs=1e-2)


def test_every_arm_is_scored_and_the_sets_are_there():
    assert {row.arm for row in plan.FULL.rows} == arms().keys() and len(set(NAMES)) == 16
    for concept in concepts():
        assert len(concept.references()) == ALONE and concept.token == f"<{concept.name}>"


def test_some_rows_alone_are_rows_of_the_full_plan():
    rows = plan.narrowed(["spectral", "lora, ties", *plan.DISTILLED], ["8"])
    assert set(plan.narrowed(plan.DISTILLED, ["1", "2", "4", "16", "look-alikes"]).rows) <= set(plan.FULL.rows)
    assert set(rows.rows) <= set(plan.FULL.rows) and (rows.size, rows.seeds) == (plan.FULL.size, plan.FULL.seeds)


@pytest.mark.parametrize("wrong", (["--arms", "nothing"], ["--arms", "spectral", "--concepts", "17"]))
def test_rows_that_do_not_exist_are_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["laboratory", *wrong])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert f"error: argument {wrong[-2]}: invalid choice: '{wrong[-1]}'" in capsys.readouterr().err


def test_a_cell_is_made_once_and_never_half(tmp_path):
    store, calls = Store(tmp_path), []

    def fails(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.cell("kind", {"a": 1}, fails)
    assert not [path for path in (tmp_path / "kind").iterdir() if path.suffix == ""]
    assert [store.numbers("kind", {"a": 1}, lambda: calls.append(1) or 7) for _ in range(2)] == [7, 7]
    assert store.numbers("kind", {"a": 2}, lambda: 8) == 8 and len(calls) == 1


def test_a_store_that_only_reads_names_what_is_missing(tmp_path):
    Store(tmp_path).numbers("kind", {"a": 1}, lambda: 7)
    reading = Store(tmp_path, make=False)
    assert reading.numbers("kind", {"a": 1}, lambda: 8) == 7
    with pytest.raises(Missing, match="kind"):
        reading.numbers("kind", {"a": 2}, lambda: 8)


def test_a_cell_in_another_hand_is_busy(tmp_path):
    outer, inner = Store(tmp_path), Store(tmp_path, wait=False)

    def make(folder):
        with pytest.raises(Busy):
            inner.cell("kind", {}, lambda _: None)

    outer.cell("kind", {}, make)


def test_rank_correlation():
    assert prediction.rank_correlation([1, 2, 3, 10], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1)
    assert prediction.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
