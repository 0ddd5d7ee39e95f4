"""Every handler as a plain function, on a toy base."""

import subprocess
import sys
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

import fusion
from app import interface
from app.notices import told
from app.session import Session, safe_name
from app.tabs import draw, library, teach
from app.teaching import Teaching, lesson

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


def taught(session, pictures, token, steps=2):
    """Teach to the end; the last view of it."""
    *_, last = teach.teach_concept(session, pictures, token, "dog", steps)
    return last


def state(pipe):
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    return [(id(p), p.requires_grad, p.detach().clone()) for part in parts for p in part.parameters()]


def same(before, after) -> bool:
    pairs = zip(before, after, strict=True)
    return all(a[:2] == b[:2] and bool((a[2] == b[2]).all()) for a, b in pairs)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def until_learning(teaching):
    while teaching.running and teaching.step < 2:
        teaching.ended.wait(0.01)


def test_the_page_builds_without_torch():
    code = (
        "import sys; from app.interface import build, launch_options; from app.session import Session;"
        "build(Session()); launch_options(); print(sorted({'torch', 'diffusers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_app_says_that_it_starts_before_it_loads_anything():
    done = subprocess.run([sys.executable, "-m", "app", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(flag in done.stdout for flag in ("--base", "--library", "--host", "--port"))


def test_private_by_default(session):
    options, page = interface.launch_options(), interface.build(session)
    assert options["run_history"] is False and "share" not in options and not options.get("allowed_paths")
    assert not page.analytics_enabled and page.delete_cache
    assert options["theme"]._stylesheets == []  # no fonts from elsewhere


def test_teaching_puts_a_concept_into_the_library(session, pictures):
    before = state(session.pipe)
    progress, loss, previews, start, stop, use = taught(session, pictures, "Rex", steps=3)
    assert "Learned in 3 steps" in progress and "&lt;rex&gt;" in progress and "<polyline" in loss.value
    assert start.interactive and not stop.visible and use.visible and len(previews.value) == 3
    entry = session.entries()["rex"]
    assert [str(part) for part in entry.slices] == ["0-3"] and entry.info.provenance.steps == 3
    assert pixels(entry.path.with_suffix(".png")).shape == (16, 16, 3)
    assert same(before, state(session.pipe))
    assert list(session.folder.iterdir()) == []  # the copies of the uploads are gone
    taught(session, pictures, "<cat>")
    assert [str(part) for part in session.entries()["cat"].slices] == ["4-7"]  # the next free slice


def test_stop_keeps_what_was_learned_and_gives_the_base_back(session, pictures):
    before = state(session.pipe)
    views = teach.teach_concept(session, pictures, "rex", "dog", 5000)
    next(views)
    until_learning(session.teaching)
    assert "Stopping" in teach.stop_teaching(session).value
    *_, last = views
    assert "Stopped after" in last[0] and last[-1].visible
    assert 2 <= session.entries()["rex"].info.provenance.steps < 5000
    assert same(before, state(session.pipe))
    assert not list(session.library.glob(".*.reserved"))


def test_a_page_joins_a_running_training_and_one_work_waits_for_the_other(session, pictures):
    teaching = Teaching(session, lesson(session, pictures, "rex", "dog", 5000, "additive", 0))
    until_learning(teaching)
    assert "Step" in next(teach.watch(session))[0]
    with pytest.raises(fusion.FusionError, match="<rex> is being taught; wait"):
        list(draw.draw_pictures(session, [], {}, "a dog"))
    with pytest.raises(fusion.FusionError, match="<rex> is being taught"):
        Teaching(session, lesson(session, pictures, "cat", "cat", 5, "additive", 0))
    with pytest.raises(fusion.FusionError, match="<rex> is being taught"):
        session.open_base("pocket")
    teaching.stop.set()
    assert teaching.ended.wait(60) and teaching.state == "stopped"
    *_, last = draw.draw_pictures(session, ["rex"], {}, "a <rex>")
    assert Path(last[0]).is_file()


def test_watching_nothing_changes_nothing(session):
    assert list(teach.watch(session)) == [(gr.skip(),) * 6]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pictures": []}, "No pictures cannot be learned from"),
        ({"noun": " "}, "one ordinary word"),
        ({"token": "<no spaces>"}, "needs angle brackets around a-z"),
        ({"kind": "aditive"}, "did you mean 'additive'"),
        ({"pictures": [("/etc/passwd", None)]}, "'passwd' is no picture"),
    ],
)
def test_what_cannot_be_taught_is_told_in_a_sentence(session, pictures, change, sentence):
    wanted = {"pictures": pictures, "token": "rex", "noun": "dog", "steps": 2, "kind": "additive", "seed": 0}
    teaching = None
    with pytest.raises(fusion.FusionError, match=sentence):
        teaching = Teaching(session, lesson(session, **wanted | change))
        teaching.ended.wait()
        raise fusion.FusionError(teaching.error)
    assert session.entries() == {}


def test_a_hostile_upload_is_named_and_leaves_nothing_behind(session, pictures, tmp_path):
    fake = tmp_path / "holiday.png"
    fake.write_text("not a picture")
    *_, last = teach.teach_concept(session, [*pictures, (str(fake), None)], "rex", "dog", 2)
    assert "holiday.png is no PNG" in last[0] and "failed" in last[0] and not last[-1].visible
    assert session.entries() == {} and list(session.folder.iterdir()) == []
    assert taught(session, pictures, "rex")[-1].visible  # and the turn was given back


def test_a_token_is_taught_once_and_no_file_is_overwritten(session, pictures):
    session.library.mkdir()
    (session.library / "rex.safetensors").write_bytes(b"somebody else's")
    taught(session, pictures, "rex")
    assert (session.library / "rex.safetensors").read_bytes() == b"somebody else's"
    assert session.entries().keys() == {"rex-2"}
    with pytest.raises(fusion.FusionError, match="already has <rex>"):
        taught(session, pictures, "<REX>")


@pytest.mark.parametrize("text", ["../../x", "a/b\\c", "CON:", "…", "x" * 300, "<dog>"])
def test_file_names_are_harmless(text):
    assert set(safe_name(text)) <= set("abcdefghijklmnopqrstuvwxyz0123456789+-_") and 0 < len(safe_name(text)) <= 48


def test_drawing_shows_previews_and_ends_with_pictures_that_carry_their_recipe(session, pictures):
    taught(session, pictures, "rex")
    made = draw.draw_pictures(
        session, ["rex"], {"rex": 0.5}, "a <rex>", "snow", 7, False, 3, 2.0, 2, [("old.png", "old")]
    )
    *previews, (stage, caption, wall, kept) = made
    assert any(isinstance(preview[0], Image.Image) for preview in previews)
    recipe = fusion.recipe_of(stage)
    assert (recipe.seed, recipe.steps, recipe.batch, recipe.negative_prompt) == (7, 3, 2, "snow")
    assert [(a.tokens, a.strength) for a in recipe.adapters] == [(("<rex>",), 0.5)]
    assert "a &lt;rex&gt; · without snow · seed 7 · 3 steps · guidance 2 · &lt;rex&gt; at 0.5" in caption
    assert len(kept) == 3 and kept[2] == ("old.png", "old") and wall.visible
    *_, again = draw.draw_pictures(session, ["rex"], {"rex": 0.5}, "a <rex>", "snow", 7, False, 3, 2.0, 2)
    assert (pixels(again[0]) == pixels(stage)).all()


def test_a_picture_nobody_waits_for_is_given_up(session):
    frames = draw.draw_pictures(session, [], {}, "a dog", steps=500)
    next(frames), next(frames), frames.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "drawing"]
    *_, last = draw.draw_pictures(session, [], {}, "a dog")
    assert Path(last[0]).is_file()


def test_drawing_says_what_is_missing(session, pictures, monkeypatch):
    taught(session, pictures, "rex")
    notes = []
    monkeypatch.setattr(draw, "warn", notes.append)
    list(draw.draw_pictures(session, ["rex"], {}, "a dog"))
    assert notes == ["The prompt does not mention <rex>, so nothing of that is drawn."]
    for keys, prompt, sentence in (([], " ", "Write a prompt"), (["cat"], "a cat", "no longer in the library")):
        with pytest.raises(fusion.FusionError, match=sentence):
            list(draw.draw_pictures(session, keys, {}, prompt))
    with pytest.raises(fusion.FusionError, match="no longer"):
        session.adapters(["../library/rex"])


def test_picking_gives_a_verdict_and_an_example(session, pictures):
    taught(session, pictures, "rex"), taught(session, pictures, "cat")
    verdict, prompt, example = draw.picked(session, ["rex"], "", "")
    assert "compatible" in verdict and prompt == "a <rex> on a blue background" and not example.visible
    verdict, prompt, example = draw.picked(session, ["rex", "cat"], prompt, example.value)
    assert "<rex> on the left and a <cat>" in prompt and "2 adapters" in verdict
    verdict, prompt, example = draw.picked(session, ["cat"], "my own words", example.value)
    assert prompt == gr.skip() and example.visible and example.value == "Try: a <cat> on a blue background"
    assert draw.picked(session, [], "", "")[0] == draw.NOTHING_PICKED


def test_what_cannot_be_combined_is_refused_before_drawing(session, pictures):
    taught(session, pictures, "rex")
    fusion.save(session.adapters(["rex"])[0], session.library / "copy.safetensors")
    verdict = draw.verdict_html(session, ["rex", "copy"])
    assert "refused" in verdict and "both use &lt;rex&gt;" in verdict and "<rex>" not in verdict


def test_the_combination_can_be_taken_along(session, pictures):
    taught(session, pictures, "rex"), taught(session, pictures, "cat")
    file = draw.fused(session, ["rex", "cat"], {"cat": 0.5})
    both = fusion.load(file.value["path"])
    assert {c.token: b.strength for c, b in zip(both.info.concepts, both.branches, strict=True)} == {
        "<rex>": 1,
        "<cat>": 0.5,
    }
    with pytest.raises(fusion.FusionError, match="at least one"):
        draw.fused(session, [], {})


def test_the_library_is_looked_at_anew_each_time(session, pictures):
    picks, nothing, cards = interface.look_at_library(session, ["gone"])
    assert not picks.visible and nothing.visible and "is empty" in cards
    taught(session, pictures, "rex")
    picks, nothing, cards = interface.look_at_library(session, ["gone", "rex"])
    assert picks.choices == [("<rex>", "rex")] and picks.value == ["rex"] and not nothing.visible
    assert all(text in cards for text in ("&lt;rex&gt;", "dog", "tiny-sd1", "0-3", "additive", "data:image/png"))
    (session.library / "rex.png").write_bytes(b"broken")
    assert 'class="initial"' in library.cards_html(session)


def test_names_from_files_are_words_never_markup(session, pictures):
    taught(session, pictures, "rex")
    adapter = session.adapters(["rex"])[0]
    evil = "<img src=x onerror=alert(1)>"
    concept = fusion.Concept("<rex>", evil)
    info = type(adapter.info)(evil, adapter.info.base, (concept,), adapter.info.provenance)
    fusion.save(type(adapter)(info, adapter.branches, adapter.tokens), session.library / "evil.safetensors")
    shown = library.cards_html(session) + draw.verdict_html(session, ["evil"])
    assert "<img src=x" not in shown and "&lt;img src=x" in shown


def test_another_base(session, base, tmp_path):
    title, chosen, *usual = interface.base_ready(session)
    assert "16 × 16" in chosen["info"] and usual == [4, 3, 2.5] and "pixelated" in title
    before = session.pipe
    for wrong in ("/nowhere", str(tmp_path)):
        with pytest.raises(fusion.FusionError):
            session.open_base(wrong)
    assert session.pipe is before and session.base == base
    session.open_base(base)
    assert session.pipe is before


def test_a_base_that_cannot_be_opened_is_said_on_the_page(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(interface, "warn", notes.append)
    session = Session(str(tmp_path / "nothing"))
    session.warm_up()
    assert "could not be opened" in interface.base_ready(session)[1]["info"] and len(notes) == 1


def test_a_name_is_suggested_where_none_is_given():
    assert teach.suggested_token("red panda", "") == "<my-red-panda>" and teach.suggested_token("dog", "rex") == "rex"


def test_examples_come_with_captions(session):
    folder = teach.example_concepts()["robot"]
    pictures, noun, token = teach.example_lesson(session, folder)
    assert len(pictures) >= 4 and all("<robot>" in caption for _, caption in pictures)
    assert (noun, token) == ("robot", "<robot>") and Path(pictures[0][0]).parent == session.folder


def test_every_error_becomes_one_escaped_sentence(session):
    def fails(session, error):
        """Raises."""
        raise error

    def streams(session, error):
        yield 1
        raise error

    for handler in (fails, streams):
        with pytest.raises(gr.Error) as caught:
            list(told(handler, session)(fusion.FusionError("Not <dog>.")) or ())
        assert caught.value.message == "Not &lt;dog&gt;." and not caught.value.print_exception
    with pytest.raises(gr.Error, match=r"unexpected happened \(ZeroDivisionError\)"):
        told(fails, session)(ZeroDivisionError("secret path /home"))


def test_the_loss_is_drawn_for_any_length():
    for count in (0, 1, 2, 5000):
        drawn = teach.loss_svg([0.5] * count, max(2, count))
        assert drawn.count("<polyline") == 2 and len(drawn) < 40_000
