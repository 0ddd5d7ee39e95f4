"""Colours and fonts: stone greys and one violet; system fonts, so that nothing is fetched from elsewhere. And how the
page is served."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr

from fusion_studio.access import AllowedHosts, checked_lifespan

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


def launch_options(
    host: str = "127.0.0.1", allowed_hosts: Iterable[str] = (), frames: Iterable[str] = ()
) -> dict[str, Any]:
    """For launch(), theme and privacy: people's pictures stay on this machine, and other sites' pages get nothing."""
    return {
        "theme": studio_theme(),
        "css_paths": [Path(__file__).parent / "style.css"],
        "run_history": False,
        "footer_links": [],
        "max_file_size": "20mb",
        "server_name": host,
        "app_kwargs": {"lifespan": checked_lifespan(AllowedHosts(host, allowed_hosts, frames))},
        # One server, which checks every request: no others that serve files or pages beside it.
        "ssr_mode": False,
        "_frontend": False,  # gradio gives up where its own page takes 3 seconds to answer, as on a busy machine
        "num_workers": 0,
    }
