"""Teach: pictures and a name in; a loss that falls and previews that grow alike; stop whenever it looks right."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import commands, markup, training_jobs
from fusion_studio.errors import bind
from fusion_studio.session import Session
from fusion_studio.settings import form_html
from fusion_studio.tabs import PRIVATE, STREAM, cli_box, command_line, save_upload, widget
from fusion_studio.tabs.progress import watch
from fusion_studio.training_jobs import SUFFIXES, TrainingQueue

CROP = 144  # pixels, of the pictures on the page
PRESETS = {"Quick": "quick", "Standard": "standard", "Careful": "careful"}
IDLE = markup.nothing(
    "Nothing is being taught",
    "Four to eight pictures are enough: the same thing on different backgrounds. Loss and drawings appear here.",
)
DROP = markup.hint("1. Drop four to eight pictures of one thing. This is what will be learned of each:")
EXAMPLES_HINT = markup.hint("No pictures at hand? Try one of ours:")
LEFT = "Stopped, or ended with the app. Resuming goes on exactly; discarding deletes its pictures and steps."
NAME = markup.hint("2. Say what it is, and what to call it.")


def build(session: Session) -> SimpleNamespace:
    examples = example_concepts()
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=300):
            with gr.Column(visible=False, elem_id="unfinished") as left:
                which = gr.Radio([], label="Not finished yet", info=LEFT, elem_classes="radio-chips")
                with gr.Row():
                    resume = gr.Button("Resume", variant="primary", size="sm", elem_id="resume", min_width=90)
                    discard = gr.Button("Discard …", size="sm", elem_id="discard", elem_classes="quiet", min_width=90)
                with gr.Row(visible=False) as sure:
                    yes = gr.Button("Yes, discard it", variant="stop", size="sm", elem_id="yes-discard", min_width=90)
                    no = gr.Button("Keep it", size="sm", elem_id="keep-unfinished", min_width=90)
            gr.HTML(DROP)
            looks: dict[str, Any] = {"file_types": list(SUFFIXES), "file_count": "multiple", "show_label": False}
            drop = gr.File(label="Pictures", height=120, elem_id="drop", **looks)
            pictures, warning = widget("pictures", [], elem_id="pictures"), gr.HTML(elem_id="warning")
            gr.HTML(EXAMPLES_HINT, visible=bool(examples))
            with gr.Row(elem_classes="examples", visible=bool(examples)):
                chosen = [gr.Button(name, size="sm", elem_classes="quiet", min_width=64, scale=0) for name in examples]
            gr.HTML(NAME)
            with gr.Row():
                noun = gr.Textbox("", label="What is it?", info="One ordinary word", placeholder="dog", elem_id="noun")
                token = gr.Textbox("", label="Its name", info="For prompts", placeholder="<rex>", elem_id="token")
            looks = {"value": "standard", "elem_classes": "radio-chips", "elem_id": "preset"}
            preset = gr.Radio(list(PRESETS.items()), label="How thoroughly", **looks)
            with gr.Accordion("All settings", open=False, elem_id="teach-settings"):
                settings = widget("settings", {"filled": {}, "defaults": {}}, form=form_html(), elem_id="all-settings")
            folder = gr.Textbox("", visible=False)  # of an example, for the command line
            start = gr.Button("Teach", variant="primary", elem_id="teach")
            cli = cli_box("teach")
        with gr.Column(scale=6, min_width=300):
            progress, loss = gr.HTML(IDLE, elem_id="progress"), gr.HTML(elem_id="loss")
            with gr.Row(visible=False, elem_id="control") as control:
                pause = gr.Button("Pause", size="sm", elem_id="pause", min_width=90)
                stop = gr.Button("Stop and keep", variant="stop", size="sm", elem_id="stop-teaching", min_width=90)
            looks = {"show_label": False, "allow_preview": False, "interactive": False, "visible": False}
            looks |= {"columns": 5, "fit_columns": False, "height": "auto", "elem_id": "previews"}
            previews = gr.Gallery(label="What it draws so far", **looks)
            ending = gr.HTML(elem_id="ending")
            use = gr.Button("Draw with it", variant="primary", visible=False, elem_id="use")
            queue = gr.HTML(elem_id="queue")
    views = [progress, loss, control, previews, ending, use, queue, pause, stop]
    noun.blur(suggested_token, [noun, token], token, **PRIVATE)
    looking: dict[str, Any] = {"api_name": "pictures", "show_progress": "hidden"}
    drop.upload(bind(add_pictures, session), [drop, pictures], [drop, pictures, warning], **looking)
    pictures.input(bind(reconsidered, session), pictures, [pictures, warning], **PRIVATE)
    for button, place in zip(chosen, examples.values(), strict=True):
        outputs = [pictures, warning, noun, token, folder]
        button.click(bind(example_lesson, session, place), None, outputs, **PRIVATE)
    form, inputs = [pictures, warning, noun, token], [pictures, token, noun, preset, settings, folder]
    added = start.click(bind(teach_concept, session), inputs, [*form, cli], api_name="teach", show_progress="hidden")
    watching = [added.then(bind(watch, session), None, views, api_name="watch", **STREAM)]
    again = resume.click(bind(resume_teaching, session), which, cli, **PRIVATE)
    watching.append(again.then(bind(watch, session), None, views, **STREAM | PRIVATE))
    look, here = bind(unfinished, session), [left, which, sure]
    discard.click(lambda: gr.Row(visible=True), None, sure, **PRIVATE)
    no.click(lambda: gr.Row(visible=False), None, sure, **PRIVATE)
    yes.click(bind(discard_teaching, session), which, here, **PRIVATE)
    for event in (again, *watching):
        event.then(look, None, here, **PRIVATE)
    pause.click(bind(pause_teaching, session), None, pause, api_name="pause_teaching", show_progress="hidden")
    stop.click(bind(stop_teaching, session), None, stop, api_name="stop_teaching", show_progress="hidden")
    return SimpleNamespace(views=views, watching=watching, use=use, settings=settings, look=look, left=here)


def add_pictures(
    session: Session, files: Sequence[str] | None, pictures: Sequence[Mapping[str, Any]] = ()
) -> tuple[Any, list[dict[str, Any]], str]:
    """Dropped files as they will be learned, beside those that are there already."""
    kept = [(save_upload(session, file).name, Path(file).name) for file in files or ()]
    new = [{"id": name, "name": title, "caption": ""} for name, title in kept]
    return gr.File(None), *reconsidered(session, [*(pictures or ()), *new])


def reconsidered(session: Session, pictures: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """All pictures looked at together: what is twice, too small or unusable is said."""
    paths = [session.upload_path(picture["id"]) for picture in pictures]
    found = fusion.check_pictures(paths, session.resolution())
    names = {path.name: str(picture.get("name", "")) for path, picture in zip(paths, pictures, strict=True)}
    looked: list[dict[str, Any]] = []
    for picture, look in zip(pictures, found.looks, strict=True):
        notes = [_named(note, names) for note in look.notes]
        crop = markup.data_url(look.crop, CROP, "WEBP") if look.crop else None
        looked.append({**picture, "crop": crop, "notes": notes})
    return looked, "".join(markup.hint(_named(text, names)) for text in found.warnings)


def _named(text: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        text = text.replace(ours, theirs)
    return text


def teach_concept(
    session: Session, pictures: Sequence[Mapping[str, Any]], token: str, noun: str, preset: str = "standard",
    settings: Mapping[str, str] | None = None, folder: str = "",
) -> tuple[Any, ...]:  # fmt: skip
    """Put a concept into the queue of those to be taught. Returns an empty form, and the command line."""
    filled: Any = (settings or {}).get("filled") or {}
    name = suggested_token(noun, token)
    new = training_jobs.new_job(session, pictures, name, noun, preset, filled)
    _queue(session, new)
    return [], "", "", "", command_line(commands.train(session, new.token, noun, preset, filled, folder))


def _queue(session: Session, new: training_jobs.TrainingJob) -> None:
    if session.trainings is None:
        session.trainings = TrainingQueue(session)
    session.trainings.add(new)


def unfinished(session: Session) -> tuple[Any, ...]:
    """Trainings that can be resumed, the first one chosen."""
    choices = [(str(own), name) for name, own in training_jobs.unfinished_jobs(session).items()]
    chosen = gr.Radio(choices, value=choices[0][1] if choices else None)
    return gr.Column(visible=bool(choices)), chosen, gr.Row(visible=False)


def resume_teaching(session: Session, name: str) -> Any:
    """Put an unfinished training into the queue, from its latest checkpoint on. Returns the command line."""
    new = training_jobs.resume_job(session, name)
    _queue(session, new)
    return command_line(commands.resume(new.place.folder))


def discard_teaching(session: Session, name: str) -> tuple[Any, ...]:
    """Delete what an unfinished training has left: pictures, settings and checkpoints; not what is in the library."""
    own = training_jobs.unfinished_job(session, name)
    own.take()
    own.place.delete()
    return unfinished(session)


def pause_teaching(session: Session) -> Any:
    """Pause the present training after its step, or go on with it."""
    teaching: TrainingQueue | None = session.trainings
    if teaching is not None:
        (teaching.going.clear if teaching.going.is_set() else teaching.going.set)()
    return gr.Button("Pause" if teaching is None or teaching.going.is_set() else "Go on")


def stop_teaching(session: Session) -> Any:
    """Stop the present training after its step; what was learned so far is kept in the library."""
    if session.trainings is not None:
        session.trainings.stop.set()
    return gr.Button("Stopping …", interactive=False)


def suggested_token(noun: str, token: str) -> str:
    """A name from the noun, where none has been given."""
    return token or (f"<my-{'-'.join(noun.lower().split())}>" if noun.strip() else "")


def example_concepts() -> dict[str, Path]:
    """Example folders that come with a checkout, by name."""
    folder = Path(fusion.__file__).parent.parent / "assets" / "concepts"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/concept.toml"))}


def example_lesson(session: Session, folder: Path) -> tuple[Any, ...]:
    """Pictures with captions, noun and token of an example."""
    about = tomllib.loads((folder / "concept.toml").read_text(encoding="utf-8"))
    pictures: list[dict[str, Any]] = []
    for source in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        caption = source.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        pictures.append({"id": session.store_upload(source).name, "name": source.name, "caption": text})
    return *reconsidered(session, pictures), about["noun"], about["token"], str(commands.near(folder))
