"""The page: header, five tabs, and what happens between them."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import markup
from fusion_studio.errors import bind, warn
from fusion_studio.session import Session, error_sentence, tokens_of
from fusion_studio.tabs import LATEST, PRIVATE, STREAM, combine, compare, draw, history, library, picked_of, teach

HEADER = (
    '<div id="title"><h1>spectral<span>fusion</span></h1>'
    "<p>Teach Stable Diffusion things of your own, and draw them together.</p></div>"
)
SMALL = 128  # pixels; smaller pictures are shown in crisp squares, not blurred to the size of the page
CRISP = "<style>#stage img, #wall img, #previews img, .grid img, .ending img { image-rendering: pixelated; }</style>"
CHIP = 96  # pixels, of the pictures on chips


def build(session: Session) -> gr.Blocks:
    with gr.Blocks(title="spectral-fusion", analytics_enabled=False, delete_cache=(3600, 6 * 3600)) as page:
        with gr.Row(elem_id="header"):
            title = gr.HTML(HEADER)
            names = ["pocket", *([session.base] if session.base else [])]
            looks: dict[str, Any] = {"elem_id": "base", "scale": 0, "min_width": 260, "info": "opening …"}
            base = gr.Dropdown(names, value=names[-1], label="Base", allow_custom_value=True, **looks)
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
        usual = [title, base, *drawing.base_controls, teaching.settings]
        parts = SimpleNamespace(
            drawing=drawing, teaching=teaching, combining=combining, comparing=comparing, shelf=shelf, tabs=tabs
        )
        fresh = connect(session, parts, (draw_tab, combine_tab, compare_tab, library_tab))

        page.load(*fresh, **PRIVATE)
        page.load(bind(base_ready, session), None, usual, **PRIVATE)
        page.load(bind(draw.first_picture, session), None, drawing.outputs, **PRIVATE)
        page.load(teaching.look, None, teaching.left, **PRIVATE)
        page.load(bind(teach.watch, session), None, teaching.views, **STREAM | PRIVATE).then(*fresh, **PRIVATE)
        opening = base.input(lambda: gr.Dropdown(info="opening …"), None, base, **PRIVATE)
        changed = opening.then(bind(Session.open_base, session), base, None, api_name="base", **STREAM)
        for after in (changed.then, changed.failure):
            after(bind(base_ready, session), None, usual, **PRIVATE)
    return page


def connect(session: Session, parts: SimpleNamespace, tabs: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """What is picked in one tab is picked in all; what is new in the library is seen wherever one goes next."""
    drawing, combining, comparing, shelf = parts.drawing, parts.combining, parts.comparing, parts.shelf
    picked = gr.State({})
    pickers = [drawing.picks, combining.picks, comparing.picks]
    for picker in pickers:
        picker.input(lambda picks: {"picked": picked_of(picks), "at": picks.get("at")}, picker, picked, **LATEST)
    look, seen_in = bind(library_choices, session), [*pickers, drawing.no_concepts]
    seen, fresh = (look, picked, seen_in), (look, None, seen_in)
    judge = (bind(draw.picked, session), [drawing.picks, drawing.prompt, drawing.example, drawing.regions])
    to_judge = [drawing.verdict, drawing.prompt, drawing.example, drawing.regions]
    draw_tab, combine_tab, compare_tab, library_tab = tabs
    draw_tab.select(*seen, **PRIVATE).then(*judge, to_judge, **PRIVATE)
    judged = (bind(combine.judged, session), [combining.picks, combining.method], combining.verdict)
    combine_tab.select(*seen, **PRIVATE).then(*judged, **PRIVATE)
    prompted = (bind(compare.prompted, session), [comparing.picks, comparing.prompt], comparing.prompt)
    compare_tab.select(*seen, **PRIVATE).then(*prompted, **PRIVATE)
    library_tab.select(shelf.look, [shelf.search, shelf.chosen], [shelf.cards, shelf.slices], **PRIVATE)
    for event in (*parts.teaching.watching, *shelf.changed, combining.saved):
        event.then(*fresh, **PRIVATE)

    def leads_to_draw(button: Any, handler: Any, inputs: Any) -> None:
        lead = lambda *values: ({"picked": handler(*values)}, gr.Tabs(selected="draw"))  # noqa: E731
        chosen = button.click(lead, inputs, [picked, parts.tabs], **PRIVATE)
        chosen.then(*seen, **PRIVATE).then(*judge, to_judge, **PRIVATE)

    leads_to_draw(parts.teaching.use, lambda: latest_concept(session), None)
    leads_to_draw(shelf.draw, lambda key: {key: 1.0} if key else {}, shelf.chosen)
    leads_to_draw(combining.draw, picked_of, combining.picks)
    drawing.teach_first.click(lambda: gr.Tabs(selected="teach"), None, parts.tabs, **PRIVATE)
    return fresh


def latest_concept(session: Session) -> dict[str, float]:
    """The concept that was taught last, picked."""
    last = session.trainings.now if session.trainings else None
    return {last.saved.stem: 1.0} if last and last.saved else {}


def library_choices(session: Session, picks: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """The concepts to pick from, as they are in the folder now, and which are picked; None: as the page has it."""
    entries = session.entries()
    names = {key: " ".join(tokens_of(entry.info)) or key for key, entry in entries.items()}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    choices = [
        {
            "key": key,
            "label": f"{names[key]} ({key})" if names[key] in twice else names[key],
            "tokens": tokens_of(entry.info),
            "picture": markup.picture_beside(entry.path, CHIP),
        }
        for key, entry in entries.items()
    ]
    kept = {key: strength for key, strength in picked_of(picks).items() if key in entries}
    value = {"choices": choices, "picked": None if picks is None else kept, "at": (picks or {}).get("at")}
    return value, value, value, gr.Column(visible=not choices)


def base_ready(session: Session) -> tuple[Any, ...]:
    """Opens the base if that has not happened yet, and says what it is; what can be chosen comes from the library."""
    name = session.base or "pocket"
    try:
        size, (_, steps, guidance) = session.resolution(), session.defaults()
    except Exception as error:  # whatever it is, the page must not go on saying "opening …"
        warn(error_sentence(error))
        return HEADER, gr.update(value=name, info="could not be opened"), *(gr.skip(),) * 4
    base = gr.update(value=name, info=f"ready, draws {size} × {size}")
    schedulers = gr.Dropdown([("the base's own", ""), *((name, name) for name in fusion.SCHEDULERS)])
    usual = {key: str(value).lower() for key, value in fusion.base_defaults(session.pipe, "training").items()}
    settings = {"filled": {}, "defaults": usual}
    return HEADER + CRISP * (size <= SMALL), base, steps, guidance, schedulers, settings
