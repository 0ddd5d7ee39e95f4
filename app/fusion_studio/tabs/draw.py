"""Draw: pick concepts, see whether they go together, write a prompt, watch the picture appear."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import gradio as gr

import fusion
from fusion_studio import commands, markup
from fusion_studio.errors import bind, warn
from fusion_studio.regions import as_regions, regions_of
from fusion_studio.session import Session, tokens_of
from fusion_studio.streaming import ProgressStream, Result, StepProgress, stream_results
from fusion_studio.tabs import LATEST, PRIVATE, STREAM, Controls, binding, cli_box, command_line, picked_of, widget
from fusion_studio.training_jobs import SUFFIXES

MAX_HISTORY = 24  # pictures kept on the page
EXAMPLE_LABEL = "Try: "
NOTHING_PICKED = markup.hint("Nothing picked: the base draws alone, with the words it knows already.")
NO_CONCEPTS = (
    "<h3>Teach it something of yours</h3><ol><li><b>Teach</b>: drop four to eight pictures of one thing, and "
    "name it.</li><li>Wait a minute or two and watch it being learned.</li>"
    "<li><b>Draw</b> it, with anything else.</li></ol>"
)
FIRST_PICTURE = markup.hint("A first picture is being drawn …")
STOPPED, NO_PICTURE = markup.hint("Stopped."), markup.hint("Your picture will appear here.")
REGIONS = (
    "Give parts of the picture prompts of their own, or just a concept's word. The prompt above is for all the rest."
)
AUTO_REGIONS = "Where none are drawn, let the base find a place for each of several concepts (takes a third longer)"


def build(session: Session) -> SimpleNamespace:
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=300):
            with gr.Column(visible=False, elem_classes="empty") as no_concepts:
                gr.HTML(NO_CONCEPTS)
                teach_first = gr.Button("Teach the first one", variant="primary", elem_id="teach-first")
            picks = widget("concepts", {}, inserts=True, elem_id="picks")
            verdict = gr.HTML(NOTHING_PICKED, elem_id="verdict")
            first = session.example_prompt([])
            prompt = gr.Textbox(first, label="Prompt", lines=2, placeholder="What should it show?", elem_id="prompt")
            example = gr.Button(
                f"{EXAMPLE_LABEL}{first}", visible=False, size="sm", elem_id="example", elem_classes="quiet"
            )
            with gr.Row(elem_id="draw-row"):
                draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                stop = gr.Button("Stop", variant="stop", elem_id="stop-drawing", visible=False, scale=1, min_width=90)
            binding_part = binding.build(session)
            with gr.Accordion("Regions", open=False, elem_id="regions-part") as regions_part:
                gr.HTML(markup.hint(REGIONS))
                regions = widget("regions", {"regions": [], "tokens": []}, elem_id="regions")
                auto_regions = gr.Checkbox(True, label=AUTO_REGIONS, container=False, elem_id="found")
            with gr.Accordion("Start from a picture", open=False, elem_id="start-part"):
                upload = gr.UploadButton("Choose a picture", file_types=[*SUFFIXES], size="sm", elem_id="start-upload")
                start, begin = gr.Textbox(visible=False), gr.Image(visible=False, interactive=False, height=160)
                leave = gr.Slider(
                    0.05, 1, 0.6, step=0.05, label="How far to depart from it", elem_id="leave", visible=False
                )
                forget = gr.Button("Do not start from it", size="sm", visible=False, elem_classes="quiet")
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                negative = gr.Textbox("", label="Negative prompt", placeholder="What should not be in it?")
                with gr.Row():
                    count = gr.Slider(1, 8, 1, step=1, label="Pictures", elem_id="count")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                    steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="draw-steps")
                    guidance = gr.Slider(1, 20, 3, step=0.5, label="Guidance")
                    own = [("the base's own", "")]
                    scheduler = gr.Dropdown(own, value="", label="Scheduler", allow_custom_value=True)
                    skip = gr.Number(
                        None, label="Clip skip", precision=0, minimum=0, maximum=32, elem_id="clip-skip",
                        info="layers left out; 1 is A1111's 2",
                    )  # fmt: skip
                    weighting = gr.Dropdown(
                        [("(word:1.2)", "a1111"), ("word+", "compel"), ("none", "none")], value="a1111",
                        label="Weights of words", elem_id="weighting",
                    )  # fmt: skip
                new_seed = gr.Checkbox(True, label="A new seed each time", container=False, elem_id="anew")
        with gr.Column(scale=6, min_width=300, elem_id="easel"):
            options: dict[str, Any] = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
            stage = gr.Image(type="filepath", elem_id="stage", **options)
            caption, cli = gr.HTML(NO_PICTURE, elem_id="caption"), cli_box("draw")
            after = gr.Column(elem_id="after")
    history, at = gr.State([]), gr.State(0)
    components: dict[str, Any] = {
        "picks": picks, "prompt": prompt, "negative_prompt": negative, "seed": seed, "new_seed": new_seed,
        "num_inference_steps": steps, "guidance_scale": guidance, "num_images": count, "scheduler": scheduler,
        "regions": regions, "auto_regions": auto_regions, "image": start, "image_strength": leave,
        "clip_skip": skip, "prompt_weighting": weighting,
    }  # fmt: skip
    controls = list(Controls(**components))
    outputs = [stage, caption, history, at, cli]
    picks.input(
        bind(selection_views, session), [picks, prompt, example, regions], [verdict, prompt, example, regions], **LATEST
    )
    picks.select(insert_token, prompt, prompt, **PRIVATE)
    example.click(lambda text: text.removeprefix(EXAMPLE_LABEL), example, prompt, **PRIVATE)
    beginning = [start, begin, leave, forget]
    upload.upload(bind(start_from, session), upload, beginning, api_name="start_picture", show_progress="hidden")
    forget.click(lambda: ("", *(gr.update(visible=False),) * 3), None, beginning, **PRIVATE)
    drawings: list[Any] = []

    def draws(trigger: Any) -> None:
        """Let an event draw with the controls as they are."""
        begun = trigger(lambda: button_states(True), None, [draw, stop], **PRIVATE)
        about = STREAM | ({"api_visibility": "private"} if drawings else {"api_name": "draw"})
        drawing = begun.then(bind(of_controls(draw_pictures), session), [history, *controls], outputs, **about)
        drawing.then(lambda: button_states(False), None, [draw, stop], **PRIVATE)  # gradio 6.31: not after a failure
        drawing.failure(lambda: (*button_states(False), NO_PICTURE), None, [draw, stop, caption], **PRIVATE)
        drawings.append(drawing)

    def stops() -> None:
        """Once all events that draw are known."""
        stop.click(lambda: (*button_states(False), STOPPED), None, [draw, stop, caption], cancels=drawings, **PRIVATE)

    draws(lambda *args, **about: gr.on([draw.click, prompt.submit], *args, **about))
    return SimpleNamespace(
        picks=picks, verdict=verdict, prompt=prompt, example=example, regions=regions, no_concepts=no_concepts,
        teach_first=teach_first, controls=controls, outputs=outputs, history=history, at=at, after=after,
        draws=draws, stops=stops, start=start, beginning=beginning, base_controls=[steps, guidance, scheduler],
        binding=binding_part, regions_part=regions_part,
    )  # fmt: skip


def first_picture(session: Session) -> Iterator[tuple[Any, ...]]:
    """What the base draws while the studio starts, for a page that has just been opened."""
    if session.base is None and not session.idle.is_set():
        yield gr.skip(), FIRST_PICTURE, *(gr.skip(),) * 3
        session.idle.wait()
    if session.base or session.first_picture is None:
        yield gr.skip(), gr.skip() if session.has_pictures else NO_PICTURE, *(gr.skip(),) * 3
        return
    path, recipe = session.first_picture
    config = recipe.config
    controls = Controls(
        {"picked": {}}, recipe.picture_prompt, seed=config.seed, new_seed=False,
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
        prompt_weighting=config.prompt_weighting,
    )  # fmt: skip
    entry = {"path": path, "words": in_words(recipe), "controls": controls}
    line = commands.generate(session, {}, fusion.GenerationConfig(prompt=recipe.picture_prompt, seed=config.seed))
    yield path, markup.hint(entry["words"]), [entry], 0, command_line(line)


def selection_views(
    session: Session, picks: Mapping[str, Any], prompt: str, example: str, regions: Any
) -> tuple[Any, ...]:
    """The verdict on a selection, and an example for it, put into a prompt that the user has not written."""
    keys = list(picked_of(picks))
    tokens = [token for adapter in session.adapters(keys) for token in tokens_of(adapter.info)]
    suggestion, own_words = (
        session.example_prompt(tokens),
        bool(prompt.strip()) and prompt != example.removeprefix(EXAMPLE_LABEL),
    )
    button = gr.Button(f"{EXAMPLE_LABEL}{suggestion}", visible=own_words and bool(suggestion))
    regions_value = {**(regions or {"regions": []}), "tokens": tokens}
    return verdict_html(session, keys), gr.skip() if own_words else suggestion, button, regions_value


def verdict_html(session: Session, keys: Sequence[str]) -> str:
    if not keys:
        return NOTHING_PICKED
    return markup.verdict(fusion.compatibility(session.adapters(keys), session.pipe))


def insert_token(prompt: str, event: gr.EventData) -> str:
    """The prompt with a concept's token at its end."""
    return f"{prompt.rstrip()} {event.token}".strip()


def start_from(session: Session, file: str) -> tuple[Any, ...]:
    """A picture to start from, checked and stored under a name of our own."""
    upload = session.store_upload(file)
    picture = fusion.load_picture(upload, "The picture")
    return upload.name, gr.Image(picture, visible=True), gr.Slider(visible=True), gr.Button(visible=True)


def of_controls(handler: Callable[[Session, Any, Controls], Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A handler of session, history and controls as one of their values, whose names the published API takes."""

    def handle(session: Session, history: Sequence[Mapping[str, Any]], *values: Any) -> Iterator[Any]:
        yield from handler(session, history, Controls(*values))

    first = list(inspect.signature(handler).parameters.values())[:2]
    names: Any = handle
    names.__name__, names.__doc__ = handler.__name__, handler.__doc__
    names.__annotations__ = get_type_hints(handler) | get_type_hints(Controls)
    names.__signature__ = inspect.Signature([*first, *inspect.signature(Controls).parameters.values()])
    return handle


def draw_pictures(
    session: Session, history: Sequence[Mapping[str, Any]], controls: Controls
) -> Iterator[tuple[Any, ...]]:
    """Draw a prompt with the picked concepts: position in the queue, previews, then the pictures."""
    if not controls.prompt.strip():
        raise fusion.FusionError("Write a prompt first: what should the picture show?")
    controls = with_loras(session, controls)
    picked, parts = picked_of(controls.picks), regions_of(controls.regions)
    opening = "" if session.is_open else "The base is being opened …"
    yield gr.skip(), markup.bar(0, 1, opening), gr.skip(), gr.skip(), gr.skip()
    adapters = session.adapters(list(picked))
    prompts = " ".join([controls.prompt, *(part["prompt"] for part in parts)])
    if unused := [words_of(one)[token] for one in adapters if one.gated for token in unnamed(one, prompts)]:
        warn(f"The prompt does not mention {' or '.join(unused)}, so nothing of that is drawn.")
    concepts = sum(len(words_of(one)) - len(unnamed(one, controls.prompt)) for one in adapters)
    seed = random.randrange(2**31) if controls.new_seed else controls.seed
    controls = controls._replace(picks={"picked": picked}, seed=seed, new_seed=False)
    auto = controls.auto_regions and not parts and concepts > 1
    config = controls.config("auto" if auto else tuple(as_regions(parts)))
    start = fusion.load_picture(session.upload_path(controls.image)) if controls.image else None

    def work(screen: ProgressStream) -> list[tuple[str, str]]:
        strengths = list(picked.values())
        pictures = fusion.generate(
            session.pipe, config, adapters, strengths=strengths, image=start, on_step=screen.on_step
        )
        return [(session.store_picture(picture), in_words(picture.recipe)) for picture in pictures]

    for frame in stream_results(session, "A picture is being drawn", work):
        if isinstance(frame, Result):
            line = commands.generate(session, picked, config, parts, from_picture=start is not None)
            entries = [{"path": path, "words": words, "controls": controls} for path, words in frame.value]
            earlier = [entry for entry in history if Path(entry["path"]).is_file()]  # old ones are deleted
            hint, entries = markup.hint(entries[0]["words"]), [*entries, *earlier][:MAX_HISTORY]
            yield entries[0]["path"], hint, entries, 0, command_line(line)
        elif isinstance(frame, StepProgress):
            yield frame.preview or gr.skip(), markup.bar(frame.step, frame.total), *(gr.skip(),) * 3
        else:
            yield gr.skip(), markup.hint(frame), *(gr.skip(),) * 3


def with_loras(session: Session, controls: Controls) -> Controls:
    """The adapters of the library that a prompt names as Forge does, <lora:NAME:0.8>, as picks instead."""
    prompt, loras = fusion.split_loras(controls.prompt)
    if controls.prompt_weighting != "a1111" or not loras:
        return controls
    for name, _ in loras:
        path = session.library / f"{name}.safetensors"
        if Path(name).name != name or not os.path.isfile(path):  # noqa: PTH113 (names may be too long)
            raise fusion.FusionError(f"<lora:{name}>: the library has no '{name}'; add it there, or take it out.")
    return controls._replace(prompt=prompt, picks={"picked": picked_of(controls.picks) | dict(loras)})


def words_of(adapter: fusion.Adapter) -> dict[str, str]:
    """Each token of an adapter, with what stands for it in prompts: itself, or the phrase that it is bound to."""
    return {token: token for token in tokens_of(adapter.info)} | fusion.bound_words(adapter)


def unnamed(adapter: fusion.Adapter, prompt: str) -> list[str]:
    """The tokens of an adapter that a prompt does not have in any form."""
    prompt = " ".join(prompt.lower().split())
    return [t for t, word in words_of(adapter).items() if t not in prompt and word.lower() not in prompt]


def in_words(recipe: fusion.Recipe) -> str:
    """What a person needs to draw the picture again."""
    config = recipe.config
    negative = [f"without {config.negative_prompt}"] if config.negative_prompt else []
    steps, guidance = f"{config.num_inference_steps} steps", f"guidance {config.guidance_scale:g}"
    used = [f"{' '.join(a.tokens) or a.name} at {a.strength:g}" for a in recipe.adapters if a.strength != 1]
    parts = [] if config.regions == "auto" else [region.prompt for region in config.regions]
    regions_value = [f"{len(parts)} regions: {', '.join(parts)}"] if parts else []
    return " · ".join(
        [recipe.picture_prompt, *regions_value, *negative, f"seed {recipe.picture_seed}", steps, guidance, *used]
    )


def button_states(busy: bool) -> tuple[Any, Any]:
    return gr.Button(interactive=not busy), gr.Button(visible=busy)
