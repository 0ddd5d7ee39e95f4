"""Teach: pictures and a name go in; the loss falls and the previews come closer; stop whenever they look right."""

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
from fusion_studio.tabs import PRIVATE, STREAM, cli_box, command_line, widget
from fusion_studio.tabs.progress import watch
from fusion_studio.training_jobs import MAX_PICTURES, SUFFIXES

CROP_SIDE = 144  # pixels, of the pictures on the page
PRESETS = {"Quick": "quick", "Standard": "standard", "Careful": "careful"}
NO_TRAINING = markup.empty(
    "Nothing is being taught",
    "Four to eight pictures are enough: the same thing on different backgrounds. Loss and drawings appear here.",
)
DROP_HINT = markup.hint("1. Drop four to eight pictures of one thing. This is what will be learned of each:")
EXAMPLES_HINT = markup.hint("No pictures at hand? Try one of ours:")
UNFINISHED_HINT = "Stopped, or ended with the studio. Resuming goes on exactly; discarding deletes pictures and steps."
Upload = Mapping[str, str | list[str] | None]  # id, name, caption, crop, notes: a picture of widgets/pictures.js
NAME_HINT = markup.hint("2. Say what it is, and what to call it.")


def build(session: Session) -> SimpleNamespace:
    examples = example_concepts()
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=300):
            with gr.Column(visible=False, elem_id="unfinished") as unfinished:
                which = gr.Radio([], label="Not finished yet", info=UNFINISHED_HINT, elem_classes="radio-chips")
                with gr.Row():
                    resume = gr.Button("Resume", variant="primary", size="sm", elem_id="resume", min_width=90)
                    discard = gr.Button("Discard …", size="sm", elem_id="discard", elem_classes="quiet", min_width=90)
                with gr.Row(visible=False) as sure:
                    yes = gr.Button("Yes, discard it", variant="stop", size="sm", elem_id="yes-discard", min_width=90)
                    no = gr.Button("Keep it", size="sm", elem_id="keep-unfinished", min_width=90)
            gr.HTML(DROP_HINT)
            options: dict[str, Any] = {"file_types": list(SUFFIXES), "file_count": "multiple", "show_label": False}
            drop = gr.File(label="Pictures", height=120, elem_id="drop", **options)
            pictures, warning = widget("pictures", [], elem_id="pictures"), gr.HTML(elem_id="warning")
            gr.HTML(EXAMPLES_HINT, visible=bool(examples))
            with gr.Row(elem_classes="examples", visible=bool(examples)):
                options = {"size": "sm", "elem_classes": "quiet", "min_width": 64, "scale": 0}
                buttons = [(gr.Button(name, **options), folder) for name, folder in examples.items()]
            gr.HTML(NAME_HINT)
            with gr.Row():
                noun = gr.Textbox("", label="What is it?", info="One ordinary word", placeholder="dog", elem_id="noun")
                token = gr.Textbox("", label="Its name", info="For prompts", placeholder="<rex>", elem_id="token")
            options = {"value": "standard", "elem_classes": "radio-chips", "elem_id": "preset"}
            preset = gr.Radio(list(PRESETS.items()), label="How thoroughly", **options)
            with gr.Accordion("All settings", open=False, elem_id="teach-settings"):
                settings = widget("settings", {"filled": {}, "defaults": {}}, form=form_html(), elem_id="all-settings")
            example = gr.Textbox("", visible=False)  # its folder, for the command line
            start = gr.Button("Teach", variant="primary", elem_id="teach")
            cli = cli_box("teach")
        with gr.Column(scale=6, min_width=300):
            progress, loss = gr.HTML(NO_TRAINING, elem_id="progress"), gr.HTML(elem_id="loss")
            with gr.Row(visible=False, elem_id="control") as control:
                pause = gr.Button("Pause", size="sm", elem_id="pause", min_width=90)
                stop = gr.Button("Stop and keep", variant="stop", size="sm", elem_id="stop-teaching", min_width=90)
            options = {"show_label": False, "allow_preview": False, "interactive": False, "visible": False}
            options |= {"columns": 5, "fit_columns": False, "height": "auto", "elem_id": "previews"}
            previews = gr.Gallery(label="What it draws so far", **options)
            result = gr.HTML(elem_id="result")
            use = gr.Button("Draw with it", variant="primary", visible=False, elem_id="use")
            queue = gr.HTML(elem_id="queue")
    views = [progress, loss, control, previews, result, use, queue, pause, stop]
    noun.blur(suggest_token, [noun, token], token, **PRIVATE)
    options = {"api_name": "pictures", "show_progress": "hidden"}
    drop.upload(bind(add_pictures, session), [drop, pictures], [drop, pictures, warning], **options)
    pictures.input(bind(check_pictures, session), pictures, [pictures, warning], **PRIVATE)
    for button, folder in buttons:
        button.click(bind(load_example, session, folder), None, [pictures, warning, noun, token, example], **PRIVATE)
    form, inputs = [pictures, warning, noun, token], [pictures, token, noun, preset, settings, example]
    added = start.click(bind(teach_concept, session), inputs, [*form, cli], api_name="teach", show_progress="hidden")
    watching = [added.then(bind(watch, session), None, views, api_name="watch", **STREAM)]
    again = resume.click(bind(resume_teaching, session), which, cli, **PRIVATE)
    watching.append(again.then(bind(watch, session), None, views, **STREAM | PRIVATE))
    list_unfinished = (bind(unfinished_trainings, session), None, [unfinished, which, sure])
    discard.click(lambda: gr.Row(visible=True), None, sure, **PRIVATE)
    no.click(lambda: gr.Row(visible=False), None, sure, **PRIVATE)
    yes.click(bind(discard_teaching, session), which, [unfinished, which, sure], **PRIVATE)
    for event in (again, *watching):
        event.then(*list_unfinished, **PRIVATE)
    pause.click(bind(pause_teaching, session), None, pause, api_name="pause_teaching", show_progress="hidden")
    stop.click(bind(stop_teaching, session), None, stop, api_name="stop_teaching", show_progress="hidden")
    return SimpleNamespace(views=views, watching=watching, use=use, settings=settings, unfinished=list_unfinished)


def add_pictures(
    session: Session, files: Sequence[str] | None, pictures: Sequence[Upload] = ()
) -> tuple[Any, list[dict[str, Any]], str]:
    """Dropped files as they will be learned, beside those that are there already."""
    if len(files or ()) > MAX_PICTURES:
        raise fusion.FusionError(f"{len(files or ())} pictures are too many; {MAX_PICTURES} is the limit.")
    uploads = [(session.store_upload(file).name, Path(file).name) for file in files or ()]
    new: list[Upload] = [{"id": upload, "name": name, "caption": ""} for upload, name in uploads]
    return gr.File(None), *check_pictures(session, [*(pictures or ()), *new])


def check_pictures(session: Session, pictures: Sequence[Upload] = ()) -> tuple[list[dict[str, Any]], str]:
    """All pictures checked together: duplicates, small and unusable ones get a remark."""
    if len(pictures) > MAX_PICTURES:
        raise fusion.FusionError(f"{len(pictures)} pictures are too many; {MAX_PICTURES} is the limit.")
    paths = [session.upload_path(str(picture.get("id"))) for picture in pictures]
    checks = fusion.check_pictures(paths, session.resolution())
    names = {path.name: str(picture.get("name", "")) for path, picture in zip(paths, pictures, strict=True)}
    checked: list[dict[str, Any]] = []
    for picture, check in zip(pictures, checks.pictures, strict=True):
        crop = markup.data_url(check.crop, CROP_SIDE, "WEBP") if check.crop else None
        checked.append({**picture, "crop": crop, "notes": [_with_names(text, names) for text in check.warnings]})
    return checked, "".join(markup.hint(_with_names(text, names)) for text in checks.warnings)


def _with_names(text: str, names: Mapping[str, str]) -> str:
    """The names that files had on the visitor's machine instead of the random ones here."""
    for name, original in names.items():
        text = text.replace(name, original)
    return text


def teach_concept(
    session: Session, pictures: Sequence[Upload], token: str, noun: str, preset: str = "standard",
    settings: Mapping[str, Any] | None = None, folder: str = "",
) -> tuple[Any, ...]:  # fmt: skip
    """Put a concept into the queue of those to be taught. Returns an empty form, and the command line."""
    filled: Any = (settings or {}).get("filled") or {}
    if not isinstance(filled, Mapping):
        raise fusion.FusionError("The settings cannot be read; fill them in again.")
    filled = {str(name): str(text) for name, text in filled.items()}
    job = training_jobs.new_job(session, pictures, suggest_token(noun, token), noun, preset, filled)
    session.jobs.add(job)
    return [], "", "", "", command_line(commands.train(session, job.token, noun, preset, filled, folder))


def unfinished_trainings(session: Session) -> tuple[Any, ...]:
    """Trainings that can be resumed, the first one chosen."""
    choices = [(str(training), name) for name, training in training_jobs.unfinished_jobs(session).items()]
    radio = gr.Radio(choices, value=choices[0][1] if choices else None)
    return gr.Column(visible=bool(choices)), radio, gr.Row(visible=False)


def resume_teaching(session: Session, name: str) -> Any:
    """Put an unfinished training into the queue, from its latest checkpoint on. Returns the command line."""
    job = training_jobs.resume_job(session, name)
    session.jobs.add(job)
    return command_line(commands.resume(job.place.folder))


def discard_teaching(session: Session, name: str) -> tuple[Any, ...]:
    """Delete an unfinished training's pictures, settings and checkpoints; what is in the library stays."""
    training = training_jobs.unfinished_job(session, name)
    training.acquire()
    training.folder.delete()
    return unfinished_trainings(session)


def pause_teaching(session: Session) -> Any:
    """Pause the present training after its step, or go on with it."""
    if job := _active_job(session):
        (job.unpaused.set if job.paused else job.unpaused.clear)()
    return gr.Button("Go on" if job and job.paused else "Pause")


def stop_teaching(session: Session) -> Any:
    """Stop the present training after its step; what was learned so far is kept in the library."""
    if job := _active_job(session):
        job.stop.set()
    return gr.Button("Stopping …", interactive=False)


def _active_job(session: Session) -> training_jobs.TrainingJob | None:
    job = training_jobs.current_training(session)
    return job if job and job.active else None


def suggest_token(noun: str, token: str) -> str:
    """The token, or one made of the noun where there is none."""
    return token or (f"<my-{'-'.join(noun.lower().split())}>" if noun.strip() else "")


def example_concepts() -> dict[str, Path]:
    """Example folders that come with the toolkit, by name."""
    package = Path(fusion.__file__).parent
    folders = (package / "_assets", package.parent / "assets")
    return {path.parent.name: path.parent for f in folders for path in sorted(f.glob("concepts/*/concept.toml"))}


def load_example(session: Session, folder: Path) -> tuple[Any, ...]:
    """Pictures with captions, noun and token of an example."""
    concept = tomllib.loads((folder / "concept.toml").read_text(encoding="utf-8"))
    pictures: list[Upload] = []
    for source in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        caption = source.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        pictures.append({"id": session.store_upload(source).name, "name": source.name, "caption": text})
    return *check_pictures(session, pictures), concept["noun"], concept["token"], str(commands.near(folder))
