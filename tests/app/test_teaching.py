"""Teaching and the library as plain functions, on a toy base."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from PIL import Image

import fusion
from fusion_studio import settings, training_jobs
from fusion_studio.markup import loss_svg
from fusion_studio.session import Session
from fusion_studio.tabs import Controls, draw, library, progress, teach
from fusion_studio.training_jobs import current_training

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


def state(pipe):
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    return [(id(p), p.requires_grad, p.detach().clone()) for part in parts for p in part.parameters()]


def same(before, after) -> bool:
    return all(a[:2] == b[:2] and bool((a[2] == b[2]).all()) for a, b in zip(before, after, strict=True))


def begin(session, files, token, steps, **filled):
    _, pictures, _ = teach.add_pictures(session, files)
    filled = {"max_train_steps": str(steps), **filled}
    return teach.teach_concept(session, pictures, token, "dog", "standard", {"filled": filled})


def until(condition):
    wait = threading.Event()
    for _ in range(6000):
        if condition():
            return
        wait.wait(0.01)
    raise AssertionError("this took more than a minute")


def learning(session, token):
    until(
        lambda: (
            current_training(session)
            and current_training(session).token == token
            and current_training(session).step >= 2
        )
    )


def test_teaching_puts_a_concept_into_the_library(session, taught):
    before = state(session.pipe)
    progress, loss, control, previews, ending, use, *_ = taught("Rex", 3)
    assert "Learned in 3 steps" in progress and "&lt;rex&gt;" in progress and "<polyline" in loss
    assert not control.visible and use.visible and len(previews.value) == 3
    assert ending.count("<img") == 4 and "Looks weak?" in ending
    entry = session.entries()["rex"]
    assert [str(part) for part in entry.slices] == ["0-3"] and entry.info.provenance.steps == 3
    with Image.open(entry.path.with_suffix(".png")) as picture:
        assert picture.size == (16, 16)
    assert same(before, state(session.pipe))
    assert list(session.uploads.iterdir()) == [] and {p.name for p in session.folder.iterdir()} <= {"uploads", "gradio"}
    taught("<cat>")
    assert [str(part) for part in session.entries()["cat"].slices] == ["4-7"]  # the next free slice


def test_pictures_are_shown_as_they_will_be_learned(session, files, tmp_path):
    for name, size in (("panorama.png", (200, 40)), ("dot.png", (40, 33))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / name)
        files.append(str(tmp_path / name))
    (tmp_path / "fake.png").write_text("not a picture")
    _, pictures, warning = teach.add_pictures(session, [*files, files[0], str(tmp_path / "fake.png")])
    notes = {picture["name"]: " ".join(picture["notes"]) for picture in pictures}
    assert "Long" in notes["panorama.png"] and "fake.png" not in notes["three.webp"]
    assert "Nearly the same as one.png" in pictures[5]["notes"][0] and warning == ""
    assert "fake.png" in [p["name"] for p in pictures if not p["crop"]] and "is no PNG" in notes["fake.png"]
    assert all(p["crop"].startswith("data:image/webp") for p in pictures[:5])
    again, warning = teach.check_pictures(session, pictures[:1])
    assert len(again) == 1 and "1 picture is few" in warning
    with pytest.raises(fusion.FusionError, match="no longer here"):
        teach.check_pictures(session, [{"id": "../../etc/passwd"}])


def test_captions_are_taken_and_name_the_concept(session, files):
    _, pictures, _ = teach.add_pictures(session, files)
    for picture, caption in zip(pictures, ("a <rex> asleep", "on a sofa", ""), strict=True):
        picture["caption"] = caption
    own = training_jobs.new_job(session, pictures, "rex", "dog", "quick", {"rank": "2", "learning_rate": "0.5"})
    texts = {p.name: p.read_text() for p in own.config.instance_data_dir.glob("*.txt")}
    assert texts == {"01.txt": "a <rex> asleep", "02.txt": "{token}, on a sofa"}
    assert own.config.rank == 2 and own.config.learning_rate == 0.5 and own.config.max_train_steps == 2
    assert len(own.references) == 3 and own.pictures == 3


def test_every_setting_is_reachable_and_checked(session, files):
    form = settings.form_html()
    for name in fusion.TrainingConfig.model_fields:
        assert (f'name="{name}"' in form) == (name not in training_jobs.PAGE_SETTINGS), name
    texts = {"random_flip": "true", "snr_gamma": "5", "targets": "unet.attn2.to_k\nunet.attn2.to_v", "slice": "3"}
    assert fusion.TrainingConfig.parsed(texts) == {
        "random_flip": True, "snr_gamma": 5, "targets": ["unet.attn2.to_k", "unet.attn2.to_v"], "slice": 3,
    }  # fmt: skip
    begin(session, files, "rex", 2, output_dir="/", base="/etc", placeholder_token="<tom>")  # not a visitor's to set
    made = session.jobs.jobs[-1].config
    assert (made.token, made.pretrained_model_name_or_path) == ("<rex>", session.base_path)
    assert made.output_dir.is_relative_to(session.library.absolute())
    list(teach.watch(session))
    (session.library / "rex.safetensors").unlink()
    for filled, sentence in (
        ({"rank": "many"}, "rank must be"), ({"adapter_type": "aditive"}, "mean 'additive'"),
        ({"slice": "99"}, "needs 400"),
        ({"targets": "unet.nowhere"}, "nowhere"), ({"resolution": "17"}, "use a multiple of"),
    ):  # fmt: skip
        with pytest.raises(fusion.FusionError, match=sentence):  # while the form still has pictures and captions
            begin(session, files, "rex", 2, **filled)
    assert training_jobs.unfinished_jobs(session) == {} and len(list(session.uploads.iterdir())) == 15
    assert list(session.entries()) == []
    assert not [path for path in session.folder.iterdir() if path.name not in ("uploads", "gradio")]


def test_stop_keeps_what_was_learned_and_gives_the_base_back(session, files):
    before = state(session.pipe)
    begin(session, files, "rex", 5000)
    learning(session, "<rex>")
    assert "Stopping" in teach.stop_teaching(session).value
    *_, last = teach.watch(session)
    assert "Stopped after" in last[0] and last[5].visible and "stopped early" in last[4]
    assert 2 <= session.entries()["rex"].info.provenance.steps < 5000
    assert same(before, state(session.pipe)) and not list(session.library.glob(".*.reserved"))


def test_others_draw_while_a_concept_is_taught_and_get_the_same_picture(session, files):
    def picture():
        *_, last = draw.draw_pictures(session, (), Controls({}, "a dog", "", 3, False))
        with Image.open(last[0]) as image:
            return image.tobytes()

    before = picture()
    begin(session, files, "rex", 5000)
    learning(session, "<rex>")
    step = current_training(session).step
    assert picture() == before  # not a bit of what is being taught leaks into it
    until(lambda: current_training(session).step > step)
    with pytest.raises(fusion.FusionError, match="<rex> is being taught on this base"):
        session.open_base("pocket")
    teach.stop_teaching(session)
    list(teach.watch(session))


def test_pause_and_go_on(session, files):
    begin(session, files, "rex", 5000)
    learning(session, "<rex>")
    assert teach.pause_teaching(session).value == "Go on"
    threading.Event().wait(1.0)  # a step that was under way may end
    step = current_training(session).step
    assert "paused" in next(teach.watch(session))[0]
    *_, last = draw.draw_pictures(session, (), Controls({}, "a dog"))
    assert Path(last[0]).is_file() and current_training(session).step == step
    assert teach.pause_teaching(session).value == "Pause"
    until(lambda: current_training(session).step > step)
    teach.stop_teaching(session)
    list(teach.watch(session))


def test_several_concepts_wait_in_a_queue_and_an_ungated_one_has_the_pipeline_alone(session, files):
    begin(session, files, "rex", 3, gating="none")
    begin(session, files, "cat", 3)
    with pytest.raises(fusion.FusionError, match="<cat> is in the library already, or being taught"):
        begin(session, files, "cat", 3)
    views = list(teach.watch(session))
    assert any("&lt;cat&gt;" in view[6] and "Everyone who has this page" in view[6] for view in views)
    assert "&lt;cat&gt;" in views[-1][0] and session.entries().keys() == {"rex", "cat"}
    assert [own.state for own in session.jobs.jobs] == ["learned", "learned"]


def test_watching_nothing_changes_nothing(session):
    assert list(teach.watch(session)) == [(gr.skip(),) * 9]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pictures": []}, "No pictures cannot be learned from"),
        ({"noun": " "}, "one ordinary word"),
        ({"token": "<no spaces>"}, "needs angle brackets around a-z"),
        ({"pictures": [{"id": "/etc/passwd", "crop": "x"}]}, "no longer here"),
        ({"preset": "fast"}, "No preset is called 'fast'"),
    ],
)
def test_what_cannot_be_taught_is_told_in_a_sentence(session, files, change, sentence):
    _, pictures, _ = teach.add_pictures(session, files)
    wanted = {"pictures": pictures, "token": "rex", "noun": "dog", "preset": "quick"} | change
    with pytest.raises(fusion.FusionError, match=sentence):
        teach.teach_concept(session, **wanted)
    assert session.entries() == {} and not session.jobs.jobs
    assert {path.name for path in session.folder.iterdir()} <= {"uploads", "gradio"}


def test_a_token_is_taught_once_and_no_file_is_overwritten(session, taught):
    session.library.mkdir()
    (session.library / "rex.safetensors").write_bytes(b"somebody else's")
    taught("rex")
    assert (session.library / "rex.safetensors").read_bytes() == b"somebody else's"
    assert session.entries().keys() == {"rex-2"}
    with pytest.raises(fusion.FusionError, match="<rex> is in the library already"):
        taught("<REX>")


def test_a_name_is_suggested_where_none_is_given():
    assert teach.suggest_token("red panda", "") == "<my-red-panda>" and teach.suggest_token("dog", "rex") == "rex"


def test_examples_come_with_captions(session):
    folder = teach.example_concepts()["robot"]
    pictures, _, noun, token, place = teach.load_example(session, folder)
    assert len(pictures) >= 4 and all("<robot>" in picture["caption"] for picture in pictures)
    assert (noun, token) == ("robot", "<robot>") and place.endswith("concepts/robot")


def test_advice_fits_what_happened(session, files):
    _, pictures, _ = teach.add_pictures(session, files)
    own = training_jobs.new_job(session, pictures, "rex", "dog", "quick")
    own.state, own.step, own.total = "stopped", 1, 10
    assert "stopped early" in progress.advice(own)
    own.state, own.step = "learned", 10
    assert "More pictures" in progress.advice(own)
    own.pictures, own.losses = 8, [1.0, 1.0, 0.8, 0.5]
    assert "still falling" in progress.advice(own)
    own.losses = [0.5] * 8
    assert "Careful" in progress.advice(own)


def test_the_loss_is_drawn_for_any_length():
    for count in (0, 1, 2, 5000):
        drawn = loss_svg([0.5] * count, max(2, count))
        assert drawn.count("<polyline") == 2 and len(drawn) < 40_000


def test_the_wall_of_cards(session, taught):
    assert "is empty" in library.cards_html(session) and library.slices_html(session) == ""
    taught("rex"), taught("cat", noun="cat")
    cards, slices = library.show_library(session)
    assert all(text in cards for text in ("&lt;rex&gt;", "dog", "tiny-sd1", "slice 0-3", "2 steps", "data:image/png"))
    assert "directions are free" in slices and "4-7" in slices
    assert "&lt;cat&gt;" not in library.cards_html(session, "rex dog")
    assert "Nothing found" in library.cards_html(session, "zebra")
    (session.library / "rex.png").write_bytes(b"broken")
    assert 'class="initial"' in library.cards_html(session)
    key, about, one, word, *_ = library.open_card(session, SimpleNamespace(key="rex"))
    assert key == "rex" and "2 steps, seed 0" in about and one.visible and word.value == "<rex>"


def test_rename_export_and_delete(session, taught):
    taught("rex"), taught("cat")
    key, about, *_, said, cli = library.rename_adapter(session, "rex", "bello")
    assert key == "bello" and "&lt;bello&gt;" in about and "Renamed" in said
    assert "--rename rex bello --tokens '<rex>=<bello>'" in cli.value
    assert session.entries().keys() == {"bello", "cat"} and (session.library / "bello.png").is_file()
    for words, sentence in (("cat", "already has <cat>"), ("two words", "has 1 tokens"), ("Ä!", "angle brackets")):
        with pytest.raises(fusion.FusionError, match=sentence):
            library.rename_adapter(session, "bello", words)
    files, _, cli = library.export_card(session, "bello", "diffusers")
    assert len(files.value) == 2 and "--to diffusers" in cli.value
    key, _, one, *_, cli = library.delete_adapter(session, "bello")
    assert key == "" and not one.visible and session.entries().keys() == {"cat"} and "--delete bello" in cli.value
    assert {path.name for path in session.library.glob("[!.]*")} == {"cat.safetensors", "cat.png"}
    for wrong in ("../cat", "bello"):
        with pytest.raises(fusion.FusionError, match="has no adapter"):
            library.delete_adapter(session, wrong)


def test_files_of_others_are_checked_before_they_are_let_in(session, taught, tmp_path):
    taught("rex")
    fusion.export(session.adapters(["rex"])[0], tmp_path / "Meine LoRA.safetensors", "kohya")
    key, *_, cli = library.import_file(session, str(tmp_path / "Meine LoRA.safetensors"))
    assert key == "meine-lora" and "meine-lora" in session.entries() and "--add" in cli.value
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "text.safetensors").write_text("hello")
    for name, sentence in (("evil", "'evil.safetensors' is a Python pickle"), ("text", "not a safetensors file")):
        with pytest.raises(fusion.FusionError, match=sentence):
            library.import_file(session, str(tmp_path / f"{name}.safetensors"))
    assert session.entries().keys() == {"rex", "meine-lora"} and list(session.uploads.iterdir()) == []


INTERRUPTED = """
import gc, os, sys, time
gc.disable()  # importing takes a fifth less
import torch
torch.set_num_threads(1)
from fusion_studio import training_jobs
from fusion_studio.session import Session
from fusion_studio.tabs import teach
training_jobs.CHECKPOINTS = 8  # of 16 steps, so one every second
base, library, *files = sys.argv[1:]
session = Session(base, library)
_, pictures, _ = teach.add_pictures(session, files)
filled = {"filled": {"max_train_steps": "16", "random_flip": "true", "gating": "tokens"}}
teach.teach_concept(session, pictures, "rex", "dog", "standard", filled)
own = session.jobs.jobs[0]
while own.step < 5:
    time.sleep(0.01)
os._exit(1)  # as a power cut would
"""


def learned(session, key):
    return [p.detach().clone() for p in fusion.load(session.library / f"{key}.safetensors").parameters()]


def test_a_training_that_ended_with_the_app_is_resumed_exactly(session, files, base, tmp_path):
    lost = Session(base, tmp_path / "other")
    words = [sys.executable, "-c", INTERRUPTED, base, str(lost.library), *files]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).returncode == 1
    assert lost.entries() == {}
    left, which, sure = teach.unfinished_trainings(lost)
    ((words, name),) = which.choices
    assert left.visible and not sure.visible and words.startswith("<rex>: ") and words.endswith("of 16 steps")
    done = int(words.split()[1])
    assert 2 <= done < 16 and done % 2 == 0  # checkpoints are every second step here
    begin(lost, files, "cat", 2)
    list(teach.watch(lost))
    assert [str(part) for part in lost.entries()["cat"].slices] == ["4-7"]  # the first slice is still the other's
    with pytest.raises(fusion.FusionError, match="<rex> is not learned to the end yet"):
        begin(lost, files, "rex", 2)
    cli = teach.resume_teaching(lost, name)
    assert "--resume_from_checkpoint latest" in cli.value and "training.toml" in cli.value
    *_, last = teach.watch(lost)
    assert "Learned in 16 steps" in last[0] and len(current_training(lost).losses) == 16 - done
    begin(session, files, "rex", 16, random_flip="true", gating="tokens")  # in one go
    list(teach.watch(session))
    assert [str(part) for part in lost.entries()["rex"].slices] == ["0-3"]
    assert all(map(torch.equal, learned(session, "rex"), learned(lost, "rex")))
    assert not teach.unfinished_trainings(lost)[0].visible and not list(lost.library.glob(".unfinished/*"))


def test_a_stopped_training_is_resumed_or_discarded(session, files):
    begin(session, files, "rex", 5000)
    learning(session, "<rex>")
    assert not teach.unfinished_trainings(session)[0].visible  # it is under way
    teach.stop_teaching(session)
    list(teach.watch(session))
    before = session.entries()["rex"].info.provenance.steps
    left, which, _ = teach.unfinished_trainings(session)
    assert left.visible and which.choices[0][0] == f"<rex>: {before} of 5000 steps"
    teach.resume_teaching(session, which.value)
    learning(session, "<rex>")
    with pytest.raises(fusion.FusionError, match="not unfinished any more"):
        teach.discard_teaching(session, which.value)  # somebody is at it
    until(lambda: current_training(session).step > before)
    teach.stop_teaching(session)
    list(teach.watch(session))
    assert session.entries().keys() == {"rex"}  # gone on with, not beside it
    assert session.entries()["rex"].info.provenance.steps > before
    for wrong in ("../..", "rex"):
        with pytest.raises(fusion.FusionError, match="not unfinished any more"):
            teach.discard_teaching(session, wrong)
    assert not teach.discard_teaching(session, which.value)[0].visible
    assert session.entries().keys() == {"rex"} and not list(session.library.glob(".unfinished/*"))


def test_a_resumed_concept_is_drawn_while_it_learns_and_learns_the_same(session, files, taught):
    def picture():
        picks = {"picked": {"rex": 1}}
        draw.selection_views(session, picks, "", "", None)
        *_, last = draw.draw_pictures(session, (), Controls(picks, "a <rex>", "", 3, False))
        with Image.open(last[0]) as image:
            return image.tobytes()

    begin(session, files, "rex", 12, text_encoder_lr="0")
    until(lambda: current_training(session) and current_training(session).step >= 3)
    teach.pause_teaching(session), teach.stop_teaching(session)
    *_, last = teach.watch(session)
    assert "Stopped after" in last[0]
    before = picture()
    _, which, _ = teach.unfinished_trainings(session)
    teach.resume_teaching(session, which.value)
    learning(session, "<rex>")
    assert picture() == before and not current_training(session).paused
    *_, last = teach.watch(session)
    assert "Learned in 12 steps" in last[0] and picture() != before
    assert session.entries().keys() == {"rex"} and current_training(session).start


def test_a_checkpoint_without_an_adapter_beside_it_is_resumed(session, files):
    begin(session, files, "rex", 12)
    until(lambda: current_training(session) and current_training(session).step >= 4)
    teach.stop_teaching(session)
    list(teach.watch(session))
    (name,) = training_jobs.unfinished_jobs(session)
    (session.library / ".unfinished" / name / "rex.safetensors").unlink()  # killed between the two
    teach.resume_teaching(session, name)
    *_, last = teach.watch(session)
    assert "Learned in 12 steps" in last[0] and current_training(session).start >= 4
    assert session.entries().keys() == {"rex"} and session.entries()["rex"].info.provenance.steps == 12


def test_what_a_studio_left_that_ended_while_it_stored_pictures_is_deleted(session):
    places = [fusion.Library(session.library).new_training_folder(f"rex-{number}") for number in range(2)]
    for place in places:
        (place.folder / "pictures").mkdir()
        (place.folder / "pictures" / "01.png").touch()
    places[1].release()
    assert training_jobs.unfinished_jobs(session) == {}
    (left,) = session.library.glob(".unfinished/*")
    assert left.name.startswith("rex-0")  # that one's studio is still at it
    places[0].release()
    (left / "rex.safetensors").touch()  # something was learned: only a person deletes that
    assert list(training_jobs.unfinished_jobs(session)) == [left.name]


def test_a_concept_that_was_learned_when_the_studio_ended_is_in_the_library_with_a_picture(session, files, monkeypatch):
    monkeypatch.setattr(training_jobs.TrainingJob, "_save", lambda *_: None)
    monkeypatch.setattr(training_jobs.TrainingJob, "release", lambda job, _: job.place.release())
    begin(session, files, "rex", 4)
    list(teach.watch(session))
    assert session.entries() == {}
    monkeypatch.undo()
    (name,) = training_jobs.unfinished_jobs(session)
    teach.resume_teaching(session, name)
    *_, last = teach.watch(session)
    assert "Learned in 4 steps" in last[0]
    with Image.open(session.entries()["rex"].path.with_suffix(".png")) as picture:
        assert picture.size == (16, 16)


def test_what_cannot_be_resumed_says_why(session, files, base):
    begin(session, files, "rex", 5000)
    learning(session, "<rex>")
    teach.stop_teaching(session)
    list(teach.watch(session))
    (name,) = training_jobs.unfinished_jobs(session)
    session.base = None
    with pytest.raises(fusion.FusionError, match="choose that base first"):
        teach.resume_teaching(session, name)
    session.base = base
    (session.library / ".unfinished" / name / "training.toml").write_text("token = ")
    assert "cannot be read" in teach.unfinished_trainings(session)[1].choices[0][0]
    with pytest.raises(fusion.FusionError, match="can only be discarded"):
        teach.resume_teaching(session, name)
    teach.discard_teaching(session, name)
    assert training_jobs.unfinished_jobs(session) == {}
