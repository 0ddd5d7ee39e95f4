"""The page: header, three tabs, what happens between them, and how it looks."""

from pathlib import Path
from typing import Any

import gradio as gr

import fusion
from app.notices import told, warn
from app.session import Session
from app.tabs import ONE_AT_A_TIME, QUIET, draw, library, teach

HEADER = (
    '<div id="title"><h1>spectral<span>fusion</span></h1>'
    "<p>Teach Stable Diffusion things of your own, and draw them together.</p></div>"
)
SMALL = 128  # pixels; smaller pictures are shown in crisp squares, not blurred to the size of the page
CRISP = "<style>#stage img, #wall img, #previews img { image-rendering: pixelated; }</style>"
FONTS = ("Inter", "ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build(session: Session) -> gr.Blocks:
    with gr.Blocks(title="spectral-fusion", analytics_enabled=False, delete_cache=(3600, 6 * 3600)) as page:
        with gr.Row(elem_id="header"):
            title = gr.HTML(HEADER)
            names = ["pocket", *([session.base] if session.base else [])]
            looks: dict[str, Any] = {"elem_id": "base", "scale": 0, "min_width": 260, "info": "opening …"}
            base = gr.Dropdown(names, value=names[-1], label="Base", allow_custom_value=True, **looks)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Draw", id="draw") as draw_tab:
                picks, no_concepts, teach_first, drawing_usual = draw.build(session)
            with gr.Tab("Teach", id="teach"):
                teaching_steps, views, taught, use = teach.build(session)
            with gr.Tab("Library", id="library") as library_tab:
                cards, refresh = library.build(session)

        look, seen = told(look_at_library, session), [picks, no_concepts, cards]
        refresh.click(look, picks, seen, api_name="library", show_progress="hidden")
        for event in (page.load, draw_tab.select, library_tab.select, taught.then):
            event(look, picks, seen, **QUIET)
        usual = [title, base, teaching_steps, *drawing_usual]
        page.load(told(base_ready, session), None, usual, **QUIET)
        page.load(told(teach.watch, session), None, views, **QUIET).then(look, picks, seen, **QUIET)
        opening = base.input(lambda: gr.Dropdown(info="opening …"), None, base, **QUIET)
        changed = opening.then(told(Session.open_base, session), base, None, api_name="base", **ONE_AT_A_TIME)
        for after in (changed.then, changed.failure):
            after(told(base_ready, session), None, usual, **QUIET)
        teach_first.click(lambda: gr.Tabs(selected="teach"), None, tabs, **QUIET)
        use.click(lambda: ([session.teaching.saved.stem], gr.Tabs(selected="draw")), None, [picks, tabs], **QUIET)
    return page


def look_at_library(session: Session, picked: list[str]) -> tuple[Any, Any, str]:
    """The concepts to pick from, as they are in the folder now; what was picked and is still there stays picked."""
    entries = session.entries()
    names = {key: " ".join(draw.tokens_of(entry.info)) or key for key, entry in entries.items()}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    choices = [(f"{name} ({key})" if name in twice else name, key) for key, name in names.items()]
    picks = gr.CheckboxGroup(choices, value=[key for key in picked or [] if key in entries], visible=bool(choices))
    return picks, gr.Column(visible=not choices), library.cards_html(session)


def base_ready(session: Session) -> tuple[Any, ...]:
    """Opens the base if that has not happened yet, and says what it is."""
    name = session.base or "pocket"
    try:
        size = session.pipe.unet.config.sample_size * session.pipe.vae_scale_factor
    except fusion.FusionError as error:
        warn(str(error))
        return HEADER, gr.update(value=name, info="could not be opened"), *(gr.skip(),) * 3
    base = gr.update(value=name, info=f"ready, draws {size} × {size}")
    return HEADER + CRISP * (size <= SMALL), base, *session.usual()


def launch_options() -> dict[str, Any]:
    """For launch(): looks, and privacy. Pictures of people's own things stay on this machine."""
    return {
        "theme": theme(),
        "css_paths": [Path(__file__).parent / "style.css"],
        "run_history": False,
        "footer_links": [],
        "max_file_size": "20mb",
    }


def theme() -> gr.themes.Base:
    """Quiet stone greys and one violet; system fonts, so that nothing is fetched from elsewhere."""
    look = gr.themes.Base(primary_hue="violet", neutral_hue="stone", radius_size="lg", font=FONTS, font_mono=MONO)
    for name, light, dark in (
        ("body_background_fill", "*neutral_50", "*neutral_950"),
        ("block_background_fill", "white", "*neutral_900"),
        ("block_label_background_fill", "white", "*neutral_900"),
        ("block_border_color", "*neutral_200", "*neutral_800"),
        ("input_background_fill", "*neutral_50", "*neutral_950"),
        ("button_primary_background_fill", "*primary_600", "*primary_600"),
    ):
        look.set(**{name: light, f"{name}_dark": dark})
    return look.set(block_border_width="1px", block_label_border_width="0px", block_shadow="none")
