"""The page: header, five tabs, and the events between them."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

import fusion
from fusion_studio import markup
from fusion_studio.errors import bind, warn
from fusion_studio.session import LIFETIME, Session, tokens_of
from fusion_studio.tabs import (
    LATEST,
    PRIVATE,
    STREAM,
    binding,
    combine,
    compare,
    draw,
    history,
    library,
    picked_of,
    teach,
)
from fusion_studio.training_jobs import current_training

HEADER = (
    '<div id="title"><h1>spectral<span>fusion</span></h1>'
    "<p>Teach Stable Diffusion things of your own, and draw them together.</p></div>"
)
SMALL_SIDE = 128  # pixels; smaller pictures are enlarged in sharp squares, not blurred
SHARP_PIXELS = (
    "<style>#stage img, #wall img, #previews img, .grid img, .result img {image-rendering: pixelated;}</style>"
)
CHIP_SIDE, MAX_CHIPS = 96, 200  # pixels, of the pictures on chips; and how many chips have one


def build(session: Session) -> gr.Blocks:
    with gr.Blocks(title="spectral-fusion", analytics_enabled=False, delete_cache=(3600, LIFETIME)) as page:
        with gr.Row(elem_id="header"):
            title = gr.HTML(HEADER)
            names = ["pocket", *([session.base] if session.base else [])]
            options: dict[str, Any] = {"elem_id": "base", "scale": 0, "min_width": 260, "info": "opening …"}
            base = gr.Dropdown(names, value=names[-1], label="Base", allow_custom_value=True, **options)
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            with gr.Tab("Draw", id="draw") as draw_tab:
                drawing = draw.build(session)
                history.build(session, drawing)
            with gr.Tab("Teach", id="teach"):
                teaching = teach.build(session)
            with gr.Tab("Combine", id="combine") as combine_tab:
                combining = combine.build(session)
            with gr.Tab("Compare", id="compare") as compare_tab:
                comparing = compare.build(session)
            with gr.Tab("Library", id="library") as library_tab:
                shelf = library.build(session)
        base_views = [title, base, *drawing.base_controls, teaching.settings]
        parts = (drawing, teaching, combining, comparing, shelf)
        refresh = connect(session, parts, tabs, (draw_tab, combine_tab, compare_tab, library_tab))

        page.load(*refresh, **PRIVATE)
        page.load(bind(base_ready, session), None, base_views, **PRIVATE)
        page.load(bind(draw.first_picture, session), None, drawing.outputs, **STREAM | PRIVATE)
        page.load(*teaching.unfinished, **PRIVATE)
        page.load(*combining.watching, **STREAM | PRIVATE)
        page.load(bind(teach.watch, session), None, teaching.views, **STREAM | PRIVATE).then(*refresh, **PRIVATE)
        opening = base.input(lambda: gr.Dropdown(info="opening …"), None, base, **PRIVATE)
        changed = opening.then(bind(Session.open_base, session), base, None, api_name="base", **STREAM)
        for after in (changed.then, changed.failure):
            after(bind(base_ready, session), None, base_views, **PRIVATE)
    return page


def connect(session: Session, parts: tuple[Any, ...], tabs: gr.Tabs, pages: tuple[gr.Tab, ...]) -> tuple[Any, ...]:
    """One selection for all tabs; what is new in the library appears in whichever tab is opened next."""
    drawing, teaching, combining, comparing, shelf = parts
    selection = gr.State({})
    pickers = [drawing.picks, combining.picks, comparing.picks]
    for picker in pickers:
        picker.input(lambda picks: {"picked": picked_of(picks), "at": picks.get("at")}, picker, selection, **LATEST)
    choices, choice_views = bind(library_choices, session), [*pickers, drawing.no_concepts]
    update, refresh = (choices, selection, choice_views), (choices, None, choice_views)
    judge = (bind(draw.selection_views, session), [drawing.picks, drawing.prompt, drawing.example, drawing.regions])
    verdict_views = [drawing.verdict, drawing.prompt, drawing.example, drawing.regions]
    draw_tab, combine_tab, compare_tab, library_tab = pages
    draw_tab.select(*update, **PRIVATE).then(*judge, verdict_views, **PRIVATE)
    combined = (bind(combine.verdict_html, session), [combining.picks, combining.method], combining.verdict)
    combine_tab.select(*update, **PRIVATE).then(*combined, **PRIVATE)
    suggestion = (bind(compare.suggest_prompt, session), [comparing.picks, comparing.prompt], comparing.prompt)
    compare_tab.select(*update, **PRIVATE).then(*suggestion, **PRIVATE)
    library_tab.select(shelf.refreshed, [shelf.search, shelf.chosen], [shelf.cards, shelf.slices], **PRIVATE)
    for event in (*teaching.watching, *shelf.changed, *combining.saved):
        event.then(*refresh, **PRIVATE)

    def link_to_draw(button: Any, handler: Any, inputs: Any) -> None:
        select = lambda *values: ({"picked": handler(*values)}, gr.Tabs(selected="draw"))  # noqa: E731
        selected = button.click(select, inputs, [selection, tabs], **PRIVATE)
        selected.then(*update, **PRIVATE).then(*judge, verdict_views, **PRIVATE)

    bound = drawing.binding.button.click(
        bind(binding.bind_lora, session), [*drawing.binding.inputs, drawing.picks], [selection, *drawing.binding.views],
        api_name="bind", show_progress="hidden",
    )  # fmt: skip
    bound.then(*update, **PRIVATE).then(*judge, verdict_views, **PRIVATE)
    link_to_draw(teaching.use, lambda: latest_concept(session), None)
    link_to_draw(shelf.draw, lambda key: {key: 1.0} if key else {}, shelf.chosen)
    link_to_draw(combining.draw, picked_of, combining.picks)
    drawing.teach_first.click(lambda: gr.Tabs(selected="teach"), None, tabs, **PRIVATE)
    return refresh


def latest_concept(session: Session) -> dict[str, float]:
    """The concept that was taught last, picked."""
    job = current_training(session)
    return {job.saved.stem: 1.0} if job and job.saved else {}


def library_choices(session: Session, picks: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """The concepts to pick from, as they are in the folder now, and which are picked; None: as the page has it."""
    entries = session.entries()
    names = {key: " ".join(markup.shortened(tokens_of(entry.info))) or key for key, entry in entries.items()}
    ambiguous = {name for name in names.values() if list(names.values()).count(name) > 1}
    choices: list[dict[str, Any]] = []
    for key, entry in entries.items():
        label = f"{names[key]} ({key})" if names[key] in ambiguous else names[key]
        picture = markup.picture_beside(entry.path, CHIP_SIDE) if len(choices) < MAX_CHIPS else None
        tokens = tokens_of(entry.info)[: markup.MAX_NAMES]
        choices.append({"key": key, "label": label, "tokens": tokens, "picture": picture})
    picked = {key: strength for key, strength in picked_of(picks).items() if key in entries}
    value = {"choices": choices, "picked": None if picks is None else picked, "at": (picks or {}).get("at")}
    return value, value, value, gr.Column(visible=not choices)


def base_ready(session: Session) -> tuple[Any, ...]:
    """Open the base if it is not open yet, and return its name, size, defaults and schedulers for the page."""
    name = session.base or "pocket"
    try:
        side, (_, steps, guidance) = session.resolution(), session.defaults()
    except Exception as error:  # whatever it is, the page must not go on showing "opening …"
        warn(session.error_sentence(error))
        return HEADER, gr.update(value=name, info="could not be opened"), *(gr.skip(),) * 4
    base = gr.update(value=name, info=f"ready, draws {side} × {side}")
    schedulers = gr.Dropdown([("the base's own", ""), *((name, name) for name in fusion.SCHEDULERS)])
    defaults = {key: str(value).lower() for key, value in fusion.base_defaults(session.pipe, "training").items()}
    settings = {"filled": {}, "defaults": defaults}
    return HEADER + SHARP_PIXELS * (side <= SMALL_SIDE), base, steps, guidance, schedulers, settings
