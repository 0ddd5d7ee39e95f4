"""One file per tab: what it shows, and its handlers as plain functions of the session and values."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gradio as gr

import fusion

# Events that only move things on the page: no spinner, no place in the published API.
PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
LATEST: dict[str, Any] = PRIVATE | {"trigger_mode": "always_last"}  # of quick clicks, the last must not be lost
# Any number of pages at once: who may use the pipeline, the session's queue decides, and shows it.
# "multiple": the page would swallow a click right after a cancel.
STREAM: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "multiple"}
WIDGETS = Path(__file__).parent.parent / "widgets"

Picks = Mapping[str, Any]  # the value of widgets/concepts.js


class Controls(NamedTuple):
    """The Draw tab's controls, or their values, in order; those that are settings by the names of GenerationConfig."""

    picks: Picks
    prompt: str
    negative_prompt: str = ""
    seed: float = 0
    new_seed: bool = True
    num_inference_steps: float | None = None
    guidance_scale: float | None = None
    num_images: float = 1
    scheduler: str | None = ""
    regions: Mapping[str, Any] | None = None  # the value of widgets/regions.js
    auto_regions: bool = True
    image: str = ""  # an upload's name
    image_strength: float = 0.6
    clip_skip: float | None = None
    prompt_weighting: str = "a1111"

    def config(self, regions: tuple[fusion.Region, ...] | Literal["auto"]) -> fusion.GenerationConfig:
        """The settings of the drawing. What is left empty, the base decides."""
        values, settings = self._asdict() | {"regions": regions}, dict[str, Any]()
        if not self.image:
            del values["image_strength"]
        for setting in fusion.settings_of(fusion.GenerationConfig):
            value = values.get(setting.name)
            if setting.kinds == {int} and isinstance(value, float) and value.is_integer():
                value = int(value)  # pages know one kind of number
            if value not in (None, ""):
                settings[setting.name] = value
        return fusion.GenerationConfig(**settings)


def widget(name: str, value: Any, **about: Any) -> gr.HTML:
    """One of our own components: a value that both sides see, and a script that shows it."""
    script = (WIDGETS / f"{name}.js").read_text(encoding="utf-8")
    place = f'<div class="{name}"></div>'
    return gr.HTML(value, html_template=place, js_on_load=script, apply_default_css=False, **about)


def at_once() -> dict[str, Any]:
    """The fusion methods that take no minutes: those have a panel of their own."""
    return {name: row for name, row in fusion.METHODS.items() if row.moments or not row.needs_base}


def picked_of(picks: Picks | None) -> dict[str, float]:
    """Which concepts are picked, and how strong."""
    try:
        return {str(key): float(value) for key, value in dict((picks or {}).get("picked") or {}).items()}
    except (TypeError, ValueError, OverflowError):
        raise fusion.FusionError("Which concepts are picked cannot be read; pick them again.") from None


def cli_box(name: str) -> gr.Textbox:
    """Where an action shows its command line."""
    options: dict[str, Any] = {"lines": 1, "max_lines": 6, "interactive": False, "buttons": ["copy"]}
    label = "The same on the command line"
    return gr.Textbox(label=label, visible=False, elem_id=f"{name}-cli", elem_classes="cli", **options)


def command_line(text: str) -> Any:
    """A command line in its box."""
    return gr.Textbox(text, visible=True)
