"""One LoRA for other programs: learned beside drawing, stopped and gone on with, its files used as the page says."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import fusion
from fusion_studio import distillation_jobs
from fusion_studio.session import Session
from fusion_studio.tabs import Controls, draw, one_lora
from trained import trained_adapter

pytestmark = pytest.mark.slow


def picks(**strengths):
    return {"picked": strengths, "choices": []}


@pytest.fixture
def small(monkeypatch):
    """Few steps and prompts."""
    monkeypatch.setitem(distillation_jobs.THOROUGHNESS, "quick", 0.01)
    monkeypatch.setattr("fusion.distillation.loop.HELD_OUT", 4)
    monkeypatch.setattr("fusion.distillation.loop.SCALE_PROMPTS", 2)


@pytest.fixture
def pets(session):
    """A library of two concepts."""
    for number, token in enumerate(("<rex>", "<tom>")):
        adapter = trained_adapter(session.pipe, token, k=number)
        fusion.Library(session.library).save(adapter, token.strip("<>"))
    return session


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def until(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_one_lora_is_learned_while_others_draw_and_used_as_the_page_says(pets, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = one_lora.make_lora(pets, picks(rex=1, tom=0.5), "Pets + Co", "quick", 4)
    assert cli.value.startswith(
        "fusion fuse library/rex.safetensors library/tom.safetensors --strength 1 0.5 -o pets-_-co"
    )
    assert "--to kohya --distill -o pets-_-co_lora.safetensors --rank 4 --max_train_steps 7" in cli.value
    with pytest.raises(fusion.FusionError, match="is being learned already"):
        one_lora.make_lora(pets, picks(rex=1), "pets-_-co", "quick", 4)
    (job,) = pets.jobs.unfinished
    until(lambda: job.step >= 1)
    with pytest.raises(fusion.FusionError, match="One LoRA of <rex> <tom> is being learned on this base"):
        pets.open_base("elsewhere")
    *_, (stage, *_) = draw.draw_pictures(pets, (), Controls(picks(rex=1), "a <rex>", seed=3, new_seed=False))
    assert job.active  # drawn in between
    *_, (panel, state, control, _, unfinished, result, files, guide, text) = one_lora.watch_distilling(pets)
    alone = fusion.generate(pets.pipe, fusion.GenerationConfig(prompt="a <rex>", seed=3), pets.adapters(["rex"]))
    assert np.array_equal(alone[0].image, pixels(stage))
    assert panel.visible and result.visible and not control.visible and not unfinished.visible
    assert "Learned in 7 steps" in state and "Prompts with several" in state and state.count("<img") == 2
    assert not list((pets.library / distillation_jobs.FOLDER).iterdir())  # nothing is left to go on with
    entry = pets.entries()["pets-_-co"]
    assert entry.path.with_suffix(".png").is_file() and not any(branch.gate for branch in entry.branches)
    assert [Path(file["path"]).name for file in files.value] == [
        f"pets-_-co_lora{end}.safetensors" for end in ("", "_rex", "_tom")
    ]
    assert "models/loras" in guide and "only diffusers opens" not in guide
    assert text.value.startswith("a embedding:pets-_-co_lora_rex on the left")
    *_, text = one_lora.show_program(pets, "A1111, Forge")
    assert text.value.endswith(" <lora:pets-_-co_lora:1>") and "a pets-_-co_lora_tom on the right" in text.value

    # The lines for diffusers, run where the files are, draw what the adapter draws here.
    files, _, text = one_lora.show_program(pets, "diffusers")
    lora, *embeddings = [Path(file["path"]).name for file in files.value]
    monkeypatch.chdir(pets.folder / "exports" / "pets-_-co")
    exec(text.value, {})
    config = fusion.GenerationConfig(prompt=job.prompt)
    assert pixels("picture.png").shape == (16, 16, 3)
    plain = DiffusionPipeline.from_pretrained(pets.base)
    for token, file in zip(("<rex>", "<tom>"), embeddings, strict=True):
        plain.load_textual_inversion(file, token=token)
    plain.load_lora_weights(lora)
    with fusion.attach(pets.pipe, job.adapter):
        ours = fusion.generate(pets.pipe, config.updated({"num_inference_steps": 3}))[0].image
    again = fusion.generate(plain, config.updated({"num_inference_steps": 3}))[0].image
    assert np.abs(np.asarray(ours, float) - np.asarray(again, float)).max() <= 2


def test_what_was_stopped_goes_on_in_another_studio(pets, small, base):
    one_lora.make_lora(pets, picks(rex=1, tom=1), "pets", "quick", 4, "a {token} in the snow\nthe {token}")
    (job,) = pets.jobs.unfinished
    until(lambda: job.step >= 2)
    assert one_lora.stop_distilling(pets).value == "Stopping …"
    *_, last = one_lora.watch_distilling(pets)
    assert f"Stopped after {job.step} of 7 steps" in last[1] and last[4].visible and not last[5].visible
    other = Session(base, pets.library)
    *_, last = one_lora.watch_distilling(other)
    assert "Not finished yet: pets" in last[1] and last[4].visible
    one_lora.go_on(other)
    *_, last = one_lora.watch_distilling(other)
    resumed = other.jobs.jobs[-1]
    assert resumed.start == job.step and "Learned in 7 steps" in last[1]
    one_lora.make_lora(pets, picks(rex=1, tom=1), "pets", "quick", 4, "a {token} in the snow\nthe {token}")
    list(one_lora.watch_distilling(pets))  # in one go
    assert pets.jobs.jobs[-1].start == 0
    once, twice = (fusion.load(pets.library / f"{key}.safetensors") for key in ("pets", "pets-2"))
    assert all((a == b).all() for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_a_studio_that_ended_at_any_moment_leaves_what_can_be_gone_on_with(pets, small, base, monkeypatch):
    folder = pets.library / distillation_jobs.FOLDER
    (folder / "empty").mkdir(parents=True)
    (folder / "half").mkdir()
    (folder / "half" / f".{distillation_jobs.REQUEST}.01234567.writing").write_text('{"picked": ')
    assert distillation_jobs.unfinished_distillations(pets) == {} and list(folder.iterdir()) == []
    (folder / "learned" / "checkpoints").mkdir(parents=True)
    (folder / "learned" / "checkpoints" / "state.safetensors").touch()  # only a person deletes that
    assert distillation_jobs.unfinished_distillations(pets) == {"learned": {}}
    distillation_jobs.discard_distillation(pets, "learned")
    with monkeypatch.context() as patch:
        patch.setattr(distillation_jobs, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))  # ends after saving
        one_lora.make_lora(pets, picks(rex=1), "pets", "quick", 4)
        list(one_lora.watch_distilling(pets))
    saved = pets.entries()["pets"].path.stat().st_mtime_ns
    other = Session(base, pets.library)
    assert list(distillation_jobs.unfinished_distillations(other)) == ["pets"]
    one_lora.go_on(other)
    list(one_lora.watch_distilling(other))
    assert other.entries().keys() == {"rex", "tom", "pets"} and list(folder.iterdir()) == []
    assert other.entries()["pets"].path.stat().st_mtime_ns > saved


def test_what_cannot_be_distilled_is_refused_in_one_sentence_before_the_work(pets, tmp_path):
    plain = trained_adapter(pets.pipe, "<bob>", k=2, gated=False)
    fusion.Library(pets.library).save(plain, "bob")
    for chosen, sentence in (
        (picks(), "Pick at least one"),
        (picks(bob=1), "no gate"),
        (picks(rex=1, bob=1), "no gate"),
        (picks(gone=1), "no longer in the library"),
    ):
        with pytest.raises(fusion.FusionError, match=sentence) as caught:
            one_lora.make_lora(pets, chosen)
        assert "\n" not in str(caught.value)
    for strange in ({"rank": -1}, {"rank": 1e9}, {"thoroughness": "never"}):
        with pytest.raises(fusion.FusionError):
            one_lora.make_lora(pets, picks(rex=1), **strange)
    assert not pets.jobs.jobs
    for number, request in enumerate(({}, [], {"picked": 3}, {"picked": {"rex": 1}, "name": "../../x"}, "\ud800")):
        folder = pets.library / distillation_jobs.FOLDER / f"odd{number}"
        folder.mkdir(parents=True)
        (folder / distillation_jobs.REQUEST).write_text(json.dumps(request))
        with pytest.raises(fusion.FusionError, match="discard it"):
            one_lora.go_on(pets)
        one_lora.discard(pets)
        assert not folder.exists()
    with pytest.raises(fusion.FusionError, match="Nothing is unfinished"):
        one_lora.discard(pets)
