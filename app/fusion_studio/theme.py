"""Colours and fonts: stone greys and one violet; system fonts, so that nothing is fetched from elsewhere."""

from pathlib import Path
from typing import Any

import gradio as gr

FONTS = ("Inter", "ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def studio_theme() -> gr.themes.Base:
    theme = gr.themes.Base(primary_hue="violet", neutral_hue="stone", radius_size="lg", font=FONTS, font_mono=MONO)
    for name, light, dark in (
        ("body_background_fill", "*neutral_50", "*neutral_950"),
        ("block_background_fill", "white", "*neutral_900"),
        ("block_label_background_fill", "white", "*neutral_900"),
        ("block_border_color", "*neutral_200", "*neutral_800"),
        ("input_background_fill", "*neutral_50", "*neutral_950"),
        ("button_primary_background_fill", "*primary_600", "*primary_600"),
        ("body_text_color_subdued", "*neutral_500", "*neutral_400"),
        ("input_placeholder_color", "*neutral_500", "*neutral_400"),  # gradio's have too little contrast
    ):
        theme.set(**{name: light, f"{name}_dark": dark})
    return theme.set(block_border_width="1px", block_label_border_width="0px", block_shadow="none")


def launch_options() -> dict[str, Any]:
    """For launch(): theme and privacy. People's pictures stay on this machine."""
    return {
        "theme": studio_theme(),
        "css_paths": [Path(__file__).parent / "style.css"],
        "run_history": False,
        "footer_links": [],
        "max_file_size": "20mb",
    }
