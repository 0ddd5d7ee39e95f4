"""The page: header, three tabs, what happens between them, and how it looks."""

from collections.abc import Iterator
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
FONTS = ("Inter", "ui-sans-serif", "system-ui", "sans-serif")  # of the visitor's machine: nothing is fetched
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build(session: Session) -> gr.Blocks:
    with gr.Blocks(title="spectral-fusion", analytics_enabled=False, delete_cache=(3600, 6 * 3600)) as page:
        with gr.Row(elem_id="header"):
            title = gr.HTML(HEADER)
            base = gr.Dropdown(
                ["pocket", *([session.base] if session.base else [])], value=session.base or "pocket", label="Base",
                info="opening …", allow_custom_value=True, elem_id="base", scale=0, min_width=260,
            )  # fmt: skip
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Draw", id="draw") as draw_tab:
                drawing = draw.build(session)
            with gr.Tab("Teach", id="teach"):
                teaching = teach.build(session)
            with gr.Tab("Library", id="library") as library_tab:
                cards = library.build(session)

        shelf = {"fn": told(look_at_library, session), "inputs": drawing.picks}
        shelf |= {"outputs": [drawing.picks, drawing.no_concepts, cards], **QUIET}
        for event in (page.load, draw_tab.select, library_tab.select, teaching.ended.then):
            event(**shelf)
        usual = [title, base, teaching.steps, *drawing.usual]
        page.load(told(base_ready, session), None, usual, **QUIET)
        page.load(told(teach.watch, session), None, teaching.views, **QUIET).then(**shelf)
        base.input(told(change_base, session), base, usual, api_name="base",
                   **ONE_AT_A_TIME)  # fmt: skip
        drawing.teach_first.click(lambda: gr.Tabs(selected="teach"), None, tabs, **QUIET)
        teaching.use.click(told(use_taught, session), None, [drawing.picks, tabs], **QUIET)
    return page


def look_at_library(session: Session, picked: list[str]) -> tuple[Any, Any, str]:
    """The concepts to pick from, as they are in the folder now; what was picked and is still there stays picked."""
    entries = session.entries()
    choices = [(" ".join(draw.tokens_of(entry.info)) or key, key) for key, entry in entries.items()]
    picks = gr.CheckboxGroup(choices, value=[key for key in picked or [] if key in entries], visible=bool(choices))
    return picks, gr.Column(visible=not choices), library.cards_html(session)


def base_ready(session: Session) -> tuple[Any, ...]:
    """Opens the base if that has not happened yet, and says what it is."""
    pipe = session.pipe
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    base = gr.Dropdown(value=session.base or "pocket", info=f"ready, draws {size} × {size}")
    return HEADER + CRISP * (size <= SMALL), base, *session.usual()


def change_base(session: Session, name: str) -> Iterator[tuple[Any, ...]]:
    """Change the base for everyone on this page's server; on an error the old one stays."""
    yield gr.skip(), gr.Dropdown(info="opening …"), *(gr.skip(),) * 3
    try:
        session.open_base(name or "")
    except fusion.FusionError as error:
        warn(str(error))
    yield base_ready(session)


def use_taught(session: Session) -> tuple[list[str], Any]:
    """Over to drawing, with the concept just learned picked."""
    return [session.teaching.saved.stem], gr.Tabs(selected="draw")


def launch_options() -> dict[str, Any]:
    """For launch(): looks, and privacy. Pictures of people's own things stay on this machine."""
    return {
        "theme": theme(),
        "css_paths": [Path(__file__).parent / "style.css"],
        "run_history": False,
        "footer_links": [],
        "max_file_size": "20mb",
        "allowed_paths": [],
        "strict_cors": True,
        "share": False,
    }


def theme() -> gr.themes.Base:
    """Quiet stone greys, one violet; shadows only under what floats."""
    look = gr.themes.Base(
        primary_hue=gr.themes.colors.violet,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        spacing_size=gr.themes.sizes.spacing_md,
        font=FONTS,
        font_mono=MONO,
    )
    return look.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="white",
        block_label_background_fill_dark="*neutral_900",
        block_label_border_width="0px",
        block_shadow="none",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_500",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
    )
