"""Every handler as a plain function, on a toy base: drawing, combining, comparing, and the page itself."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image

import fusion
from fusion_studio import interface, markup, regions, theme
from fusion_studio.errors import bind
from fusion_studio.pipeline_queue import PipelineQueue
from fusion_studio.session import Session, safe_name
from fusion_studio.streaming import StepProgress
from fusion_studio.tabs import Controls, binding, combine, compare, draw, history, library, picked_of, progress
from fusion_studio.training_jobs import current_training

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def picks(**strengths):
    return {"picked": strengths, "choices": []}


def drawn(session, *args, history=(), **named):
    *_, last = draw.draw_pictures(session, history, Controls(*args, **named))
    return last


def test_the_page_builds_without_torch():
    code = (
        "import sys; from fusion_studio.interface import build; from fusion_studio.theme import launch_options;"
        "from fusion_studio.session import Session; build(Session()); launch_options();"
        "print(sorted({'torch', 'diffusers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_app_says_that_it_starts_before_it_loads_anything(tmp_path):
    words = [sys.executable, "-m", "fusion_studio"]
    done = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(flag in done.stdout for flag in ("--base", "--library", "--host", "--port", "--auth"))
    (tmp_path / "who").write_text("anna\n")
    for wrong, said in (("who", "name:password"), ("nobody", "cannot be read")):
        done = subprocess.run([*words, "--auth", str(tmp_path / wrong)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr


def test_private_by_default(session):
    options, page = theme.launch_options(), interface.build(session)
    assert options["run_history"] is False and "share" not in options and not options.get("allowed_paths")
    assert not page.analytics_enabled and page.delete_cache and options["max_file_size"]
    assert options["theme"]._stylesheets == []  # no fonts from elsewhere


def test_the_line_is_first_come_first_served_and_says_how_long_it_is():
    line, order = PipelineQueue(), []
    with line.acquire("A picture is being drawn"):
        with line.enter("second", interval=0.01) as second, line.enter("third", interval=0.01) as third:
            second_waits, third_waits = next(second), next(third)
            assert (second_waits.ahead, third_waits.ahead) == (1, 2)
            assert str(second_waits) == "A picture is being drawn. You are next."
            assert "2 are before you" in str(third_waits)
        threads = []
        for number in range(3):
            threads.append(threading.Thread(target=lambda n=number: take(line, n, order)))
            threads[-1].start()
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2]


def take(line, number, order):
    with line.acquire("x"):
        order.append(number)


def test_drawing_shows_previews_and_ends_with_pictures_that_carry_their_recipe(session, taught):
    taught("rex")
    old = [{"path": __file__, "words": "old", "controls": []}, {"path": "deleted.png", "words": "", "controls": []}]
    made = draw.draw_pictures(session, old, Controls(picks(rex=0.5), "a <rex>", "snow", 7, False, 3, 2.0, 2))
    *previews, (stage, caption, kept, at, cli) = made
    assert any(isinstance(preview[0], Image.Image) for preview in previews)
    recipe = fusion.recipe_of(stage)
    config = recipe.config
    assert (config.seed, config.num_inference_steps, config.num_images) == (7, 3, 2)
    assert config.negative_prompt == "snow"
    assert [(a.tokens, a.strength) for a in recipe.adapters] == [(("<rex>",), 0.5)]
    assert "a &lt;rex&gt; · without snow · seed 7 · 3 steps · guidance 2 · &lt;rex&gt; at 0.5" in caption
    assert len(kept) == 3 and kept[2]["words"] == "old" and at == 0
    assert (
        "--prompt 'a <rex>' --negative_prompt snow --seed 7 --num_images 2 --num_inference_steps 3" in cli.value
        and "--strength 0.5" in cli.value
    )


def test_one_click_repeats_a_picture_of_the_history(session, taught):
    taught("rex")
    stage, _, kept, *_ = drawn(session, picks(rex=0.5), "a <rex>", "", 3, True)
    again, *controls = history.controls_of(kept, 0, {"choices": ["all"], "picked": {}})
    assert again == {"choices": ["all"], "picked": {"rex": 0.5}} and controls[3] is False  # no new seed
    assert (pixels(drawn(session, again, *controls)[0]) == pixels(stage)).all()
    assert history.controls_with_new_seed(kept, 0, {})[4] is True
    wall, again, before = history.history_views(kept)
    assert not wall.visible and again.visible and before.visible


def test_before_and_after(session, taught):
    taught("rex")
    with pytest.raises(fusion.FusionError, match="Draw a picture first"):
        next(history.before_and_after(session, history.SIDES[0], [], 0))
    _, _, kept, *_ = drawn(session, picks(rex=1), "a <rex>", "", 3, False)
    *_, (slider, _) = history.before_and_after(session, history.SIDES[0], kept, 0)
    plain, _ = (entry["path"] for entry in slider.value)
    assert fusion.recipe_of(plain).config.prompt == "a dog" and fusion.recipe_of(plain).adapters == ()
    for side, sentence in ((1, "no picture before"), (2, "did not start")):
        with pytest.raises(fusion.FusionError, match=sentence):
            next(history.before_and_after(session, history.SIDES[side], kept, 0))
    _, _, more, *_ = drawn(session, picks(rex=1), "a <rex>", "", 4, False, history=kept)
    *_, (slider, _) = history.before_and_after(session, history.SIDES[1], more, 0)
    assert Path(slider.value[0]["path"]).name == Path(kept[0]["path"]).name


def test_a_picture_can_be_the_start_of_the_next(session, files):
    name, shown, leave, forget = draw.start_from(session, files[0])
    assert shown.visible and leave.visible and forget.visible
    stage, _, kept, _, cli = drawn(session, picks(), "a dog", image=name, image_strength=0.5)
    assert fusion.recipe_of(stage).config.image_strength == 0.5 and "--image PICTURE.png" in cli.value
    assert history.start_from_entry(session, kept, 0)[0] != name
    for wrong in ("../../etc/passwd", "0" * 16 + ".png", "/etc/passwd"):
        with pytest.raises(fusion.FusionError, match="no longer here"):
            drawn(session, picks(), "a dog", image=wrong)


def test_a_picture_nobody_waits_for_is_given_up(session):
    frames = draw.draw_pictures(session, (), Controls(picks(), "a dog", num_inference_steps=500))
    next(frames), next(frames), frames.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "drawing"]
    assert Path(drawn(session, picks(), "a dog")[0]).is_file()


def test_a_prompt_from_forge_takes_its_loras_from_the_library(session, taught):
    taught("rex")
    stage, *_ = drawn(session, picks(), "a <rex> <lora:rex:0.5>", "", 3, False)
    recipe = fusion.recipe_of(stage)
    assert recipe.config.prompt == "a <rex>" and [a.strength for a in recipe.adapters] == [0.5]
    same, *_ = drawn(session, picks(rex=0.5), "a <rex>", "", 3, False)
    assert (pixels(stage) == pixels(same)).all()
    for name in ("nobody", "../library/rex"):
        with pytest.raises(fusion.FusionError, match=f"<lora:{name}>: the library has no"):
            drawn(session, picks(), f"a <rex> <lora:{name}:1>")


def test_drawing_says_what_is_missing(session, taught, monkeypatch):
    taught("rex")
    notes = []
    monkeypatch.setattr(draw, "warn", notes.append)
    drawn(session, picks(rex=1), "a dog")
    assert notes == ["The prompt does not mention <rex>, so nothing of that is drawn."]
    for picked, prompt, sentence in ((picks(), " ", "Write a prompt"), (picks(cat=1), "a cat", "no longer in the lib")):
        with pytest.raises(fusion.FusionError, match=sentence):
            drawn(session, picked, prompt)
    with pytest.raises(fusion.FusionError, match="no longer"):
        session.adapters(["../library/rex"])


def test_several_concepts_get_places_found_by_the_base_unless_told_otherwise(session, taught):
    taught("rex")
    taught("tom")
    both, prompt = picks(rex=1, tom=1), "a <rex> beside a <tom>"
    stage, _, kept, _, cli = drawn(session, both, prompt, "", 3, False)
    assert " --region auto" in cli.value
    again, *controls = history.controls_of(kept, 0, both)
    assert (pixels(drawn(session, again, *controls)[0]) == pixels(stage)).all()
    for options in ({"auto_regions": False}, {"regions": {"regions": [{"prompt": "a dog", "box": [0, 0, 0.5, 1]}]}}):
        *_, cli = drawn(session, both, prompt, "", 3, False, **options)
        assert "--region auto" not in cli.value
    *_, cli = drawn(session, picks(rex=1), "a <rex>", "", 3, False)
    assert "--region" not in cli.value


def test_regions_are_checked_before_anything_is_drawn():
    left = {"prompt": "a <rex>", "box": [0, 0, 0.5, 2]}
    assert regions.regions_of({"regions": [left]}) == [{"prompt": "a <rex>", "box": (0, 0, 0.5, 1)}]
    assert regions.regions_of(None) == [] and regions.regions_of({"tokens": []}) == []
    white = markup.data_url(Image.new("RGB", (64, 64), "white"), None)
    painted = regions.regions_of({"regions": [{"prompt": "a cat", "mask": white}]})
    assert regions.as_regions(painted)[0].mask.getextrema() == (255, 255)
    cases = (
        ([{"prompt": " ", "box": [0, 0, 1, 1]}], "Region 1 has no prompt"),
        ([{"prompt": "a cat", "mask": ""}], "Nothing is painted in region 1"),
        ([left] * 13, "13 regions are too many"),
    )
    for wrong, sentence in cases:
        with pytest.raises(fusion.FusionError, match=sentence):
            regions.regions_of({"regions": wrong})
    large = markup.data_url(Image.new("RGB", (2000, 2000)), None)
    for wrong in ("/etc/passwd", "data:image/png;base64,AAAA", "data:image/png;base64,?", large):
        with pytest.raises(fusion.FusionError, match="cannot be read"):
            regions._mask(wrong, 1)


def test_regions_reach_the_drawing_and_the_command_line(session, monkeypatch):
    configs, plain = [], fusion.generate

    def watched(pipe, config, *args, **named):
        configs.append(config)
        return plain(pipe, config, *args, **named)

    monkeypatch.setattr(fusion, "generate", watched, raising=False)
    value = {"regions": [{"prompt": "a dog", "box": [0, 0, 0.5, 1]}, {"prompt": "a cat", "box": [0.5, 0, 1, 1]}]}
    *_, cli = drawn(session, picks(), "two things", regions=value)
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    assert configs[0].regions == (fusion.Region("a dog", left), fusion.Region("a cat", right))
    assert "--region 'a dog: 0 0 0.5 1' --region 'a cat: 0.5 0 1 1'" in cli.value


def test_picking_gives_a_verdict_and_an_example(session, taught):
    taught("rex"), taught("cat")
    verdict, prompt, example, areas = draw.selection_views(session, picks(rex=1), "", "", {"regions": [1]})
    assert "compatible" in verdict and prompt == "a <rex> on a blue background" and not example.visible
    assert areas == {"regions": [1], "tokens": ["<rex>"]}
    verdict, prompt, example, _ = draw.selection_views(session, picks(rex=1, cat=1), prompt, example.value, None)
    assert "<rex> on the left and a <cat>" in prompt and "2 adapters" in verdict
    verdict, prompt, example, _ = draw.selection_views(session, picks(cat=1), "my own words", example.value, None)
    assert prompt == gr.skip() and example.visible and example.value == "Try: a <cat> on a blue background"
    assert draw.selection_views(session, picks(), "", "", None)[:2] == (
        draw.NOTHING_PICKED,
        session.example().prompt,
    )
    assert draw.insert_token("a ", SimpleNamespace(token="<rex>")) == "a <rex>"


def test_the_verdict_and_the_heat_map_come_before_any_picture(session, taught):
    assert combine.verdict_html(session, picks(), "direct_sum") == combine.NOTHING_PICKED
    taught("rex"), taught("cat")
    shown = combine.verdict_html(session, picks(rex=1, cat=1), "direct_sum")
    assert "2 adapters, each acting" in shown and shown.count("<tr>") == 3 and "act on every word" not in shown
    assert "act on every word" in combine.verdict_html(session, picks(rex=1, cat=1), "average")
    assert "regression" in combine.save_as_one(session, picks(rex=1, cat=1), "regression")[1].value
    assert "rex+cat" in session.entries() and not session.adapters(["rex+cat"])[0].gated
    fusion.save(session.adapters(["rex"])[0], session.library / "copy.safetensors")
    refused = combine.verdict_html(session, picks(rex=1, copy=1), "direct_sum")
    assert "refused" in refused and "both use &lt;rex&gt;" in refused and "<rex>" not in refused


def test_the_combination_is_saved_exported_and_baked(session, taught):
    taught("rex"), taught("cat")
    both = picks(rex=1, cat=0.5)
    said, cli = combine.save_as_one(session, both, "direct_sum", "My Pets!")
    assert "my-pets" in said and "fusion fuse" in cli.value and "--strength 1 0.5" in cli.value
    made = session.adapters(["my-pets"])[0]
    assert {c.token: b.strength for c, b in zip(made.info.concepts, made.branches, strict=True)} == {
        "<rex>": 1,
        "<cat>": 0.5,
    }
    files, notes, cli = combine.export_picked(session, both, form="kohya")
    names = {Path(file["path"]).name for file in files.value}
    assert names == {"rex+cat_kohya.safetensors", "rex+cat_kohya_rex.safetensors", "rex+cat_kohya_cat.safetensors"}
    assert "A plain LoRA cannot be gated" in notes and str(session.folder) not in notes and "--to kohya" in cli.value
    files, _, _ = combine.export_picked(session, both)
    assert fusion.load(files.value[0]["path"]).info.name == "rex+cat"
    with pytest.raises(fusion.FusionError, match="accept that first"):
        combine.bake_picked(session, both)
    said, cli = combine.bake_picked(session, both, "direct_sum", "pets", accept=True)
    assert (session.library / "models" / "pets" / "model_index.json").is_file() and "--gating none" in cli.value
    with pytest.raises(fusion.FusionError, match="is there already"):
        combine.bake_picked(session, both, "direct_sum", "pets", accept=True)
    with session.queue.acquire("A picture is being drawn"):  # a base is opened while nobody uses models
        waiting = threading.Thread(target=combine.bake_picked, args=(session, both, "direct_sum", "later", True))
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()
    waiting.join(60)
    assert (session.library / "models" / "later" / "model_index.json").is_file()
    with pytest.raises(fusion.FusionError, match="at least one"):
        combine.save_as_one(session, picks())


def test_the_grid_is_measured_and_can_be_kept(session, taught):
    taught("rex"), taught("cat")
    both = picks(rex=1, cat=1)
    assert (
        compare.suggest_prompt(session, both, "") == "a <rex> on the left and a <cat> on the right on a red background"
    )
    assert compare.suggest_prompt(session, both, "my own") == gr.skip()
    *steps, (grid, legend, sheet, _) = compare.draw_grid(session, both, "a <rex>", "0.5, 1", ["direct_sum", "average"])
    assert grid.count("<img") == 8 and "kept" in grid and "leakage" in grid and "Kept" in legend
    assert Path(sheet.value["path"]).is_file() and "--strengths 0.5 1 --methods direct_sum average" in steps[0][3].value
    for strengths, sentence in (("much", "write numbers"), ("", "1 to 64 pictures")):
        with pytest.raises(fusion.FusionError, match=sentence):
            list(compare.draw_grid(session, both, "a <rex>", strengths))


def test_names_from_files_are_words_never_markup(session, taught):
    taught("rex")
    adapter = session.adapters(["rex"])[0]
    evil = "<img src=x onerror=alert(1)>"
    info = type(adapter.info)(evil, adapter.info.base, (fusion.Concept("<rex>", evil),), adapter.info.provenance)
    fusion.save(type(adapter)(info, adapter.branches, adapter.tokens), session.library / "evil.safetensors")
    shown = (
        library.cards_html(session)
        + library.slices_html(session)
        + combine.verdict_html(session, picks(evil=1), "direct_sum")
    )
    shown += "".join(str(part) for part in library.detail(session, "evil"))
    assert "<img src=x" not in shown and "&lt;img src=x" in shown


def test_what_is_picked_stays_as_long_as_it_is_there(session, taught):
    *pickers, nothing = interface.library_choices(session, {"picked": {"gone": 1}})
    assert pickers[0] == {"choices": [], "picked": {}, "at": None} and nothing.visible
    taught("rex")
    value, *_, nothing = interface.library_choices(session, {"picked": {"gone": 1, "rex": 0.5}, "at": 7})
    assert value["picked"] == {"rex": 0.5} == picked_of(value) and value["at"] == 7 and not nothing.visible
    assert [(c["key"], c["label"], c["tokens"]) for c in value["choices"]] == [("rex", "<rex>", ["<rex>"])]
    assert value["choices"][0]["picture"].startswith("data:image/png")
    assert interface.library_choices(session)[0]["picked"] is None  # as the page has it
    assert interface.latest_concept(session) == {"rex": 1.0}


def test_another_base(session, base, tmp_path):
    title, chosen, *usual = interface.base_ready(session)
    assert "16 × 16" in chosen["info"] and usual[:2] == [3, 2.5] and "pixelated" in title
    assert usual[-1]["defaults"]["rank"] == "4"
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


@pytest.mark.parametrize("text", ["../../x", "a/b\\c", "CON:", "…", "x" * 300, "<dog>", "--flag"])
def test_file_names_are_harmless(text):
    made = safe_name(text)
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789+-_") and 0 < len(made) <= 48 and made[0] != "-"


def test_every_error_becomes_one_escaped_sentence(session):
    def fails(session, error):
        """Raises."""
        raise error

    def streams(session, error):
        yield 1
        raise error

    for handler in (fails, streams):
        with pytest.raises(gr.Error) as caught:
            list(bind(handler, session)(fusion.FusionError("Not <dog>.")) or ())
        assert caught.value.message == "Not &lt;dog&gt;." and not caught.value.print_exception
    with pytest.raises(gr.Error, match=r"unexpected happened \(ZeroDivisionError\)"):
        bind(fails, session)(ZeroDivisionError("secret path /home"))


def test_requests_that_fail_because_the_studio_ends_say_so_and_are_no_bug(base, tmp_path, caplog):
    session, picture = Session(str(base), tmp_path / "out"), tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    session.close()
    for handler in (draw.start_from, binding.import_lora):
        with pytest.raises(gr.Error, match="The studio is ending"):
            bind(handler, session)(str(picture))
    assert "Unexpected" not in caplog.text


def test_two_drawings_take_turns_and_the_second_says_so(session):
    first = draw.draw_pictures(session, (), Controls(picks(), "a dog", num_inference_steps=500))
    while not isinstance(next(first)[0], Image.Image):
        pass
    second = draw.draw_pictures(session, (), Controls(picks(), "a dog", num_inference_steps=2))
    next(second)
    assert "A picture is being drawn. You are next." in next(second)[1]
    first.close()
    *_, last = second
    assert Path(last[0]).is_file()
    assert StepProgress(1, 2).preview is None


@pytest.fixture
def pocket_is_small(base, monkeypatch):
    """The embedded base is the toy: what it is asked to draw."""
    asked, opened, plain = [], fusion.open_pipeline(base), fusion.generate
    monkeypatch.setattr(fusion, "open_pipeline", lambda name=None, **_: opened, raising=False)
    watched = lambda pipe, config, *a, **n: asked.append(config) or plain(pipe, config, *a, **n)  # noqa: E731
    monkeypatch.setattr(fusion, "generate", watched, raising=False)
    return asked


def test_the_embedded_base_is_opened_and_has_drawn_before_anyone_asks(pocket_is_small, tmp_path):
    session = Session(library=tmp_path)
    with session.queue.acquire("A picture is being drawn"):
        warming = threading.Thread(target=session.warm_up)
        warming.start()
        deadline = time.monotonic() + 60
        while not session.is_open and time.monotonic() < deadline:
            time.sleep(0.01)
        assert session.is_open and warming.is_alive() and pocket_is_small == []  # it takes its turn like everyone
    warming.join()
    assert pocket_is_small == [fusion.base_example()]
    other = Session("some/base", tmp_path)
    other.warm_up()
    assert other.is_open and len(pocket_is_small) == 1  # a picture of another base may take minutes
    assert next(draw.first_picture(other))[0] == gr.skip()


def test_the_picture_that_greets_can_be_repeated(pocket_is_small, tmp_path):
    session = Session(library=tmp_path)
    with session.queue.acquire("A picture is being drawn"):
        warming = threading.Thread(target=session.warm_up)
        warming.start()
        while session.idle.is_set():
            time.sleep(0.01)
        answers = draw.first_picture(session)  # the page was faster
        assert "is being drawn" in next(answers)[1]
    path, caption, entries, at, _ = next(answers)
    warming.join()
    example = fusion.base_example()
    assert f"{example.prompt} · seed {example.seed}" in caption
    _, *controls = history.controls_of(entries, at, picks())
    *_, again = draw.draw_pictures(session, (), Controls(picks(), *controls))
    assert Path(again[0]).read_bytes() == Path(path).read_bytes()


def test_drawing_says_that_the_base_is_still_being_opened(pocket_is_small, tmp_path):
    session = Session(library=tmp_path)
    first = next(draw.draw_pictures(session, (), Controls(picks(), "a dog")))
    assert "The base is being opened" in first[1] and not session.is_open
    *_, last = draw.draw_pictures(session, (), Controls(picks(), "a dog"))
    assert Path(last[0]).is_file()
    assert "being opened" not in next(draw.draw_pictures(session, (), Controls(picks(), "a dog")))[1]


@pytest.mark.parametrize("failing", ["open_pipeline", "generate"])
def test_a_failing_warm_up_leaves_an_app_that_can_be_used(pocket_is_small, failing, tmp_path, monkeypatch, caplog):
    def breaks(*_, **__):
        raise MemoryError("of the machine")

    notes, working = [], getattr(fusion, failing)
    monkeypatch.setattr(interface, "warn", notes.append)
    monkeypatch.setattr(fusion, failing, breaks, raising=False)
    session = Session(library=tmp_path)
    session.warm_up()
    assert "The base is not ready" in caplog.text
    info = interface.base_ready(session)[1]["info"]
    if failing == "open_pipeline":
        assert info == "could not be opened"
        assert notes == ["Something unexpected happened (MemoryError); the terminal has details."]
        with pytest.raises(MemoryError):
            list(draw.draw_pictures(session, (), Controls(picks(), "a dog")))
    else:
        assert "ready" in info and notes == []
    monkeypatch.setattr(fusion, failing, working, raising=False)
    assert Path(drawn(session, picks(), "a dog")[0]).is_file()


def test_every_method_can_be_compared(session, taught):
    choices = next(b for b in interface.build(session).blocks.values() if getattr(b, "label", "") == "Methods")
    assert [name for name, _ in choices.choices] == [name for name in fusion.METHODS if name != "distill"]


def test_nothing_in_the_library_is_left_out_silently(session, taught):
    taught("rex")
    (session.library / "broken.safetensors").write_text("nothing")
    for search in ("", "zebra"):
        assert "cannot be read (the terminal says why): broken." in library.cards_html(session, search)
    assert "cannot be read" not in library.cards_html(Session(library=session.library / "none"))


def test_steps_are_not_read_aloud_but_the_end_is(session, taught):
    assert 'role="status"' in taught("rex")[0]
    current_training(session).state = "learning"
    assert 'role="status"' not in progress.state_html(current_training(session))
