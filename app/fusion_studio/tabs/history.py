"""The pictures drawn on this page: show one again, repeat it, start from it, compare it with another."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import re
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import markup
from fusion_studio.errors import bind
from fusion_studio.session import Session
from fusion_studio.streaming import ProgressStream, Result, StepProgress, stream_results
from fusion_studio.tabs import PRIVATE, STREAM, Controls, Picks, picked_of

SIDES = ("without the concepts", "the picture before", "the picture it started from")


def build(session: Session, page: SimpleNamespace) -> None:
    with page.after:
        looks: dict[str, Any] = {"show_label": False, "interactive": False, "allow_preview": False}
        wall = gr.Gallery(columns=6, height="auto", visible=False, elem_id="wall", **looks)
        with gr.Row(visible=False, elem_id="again") as again:
            repeat = gr.Button("Repeat", size="sm", elem_id="repeat", min_width=90)
            vary = gr.Button("Another seed", size="sm", elem_id="vary", min_width=90)
            onward = gr.Button("Start from it", size="sm", elem_id="onward", min_width=90)
        with gr.Accordion("Before and after", open=False, visible=False, elem_id="before-part") as before_part:
            against = gr.Radio(list(SIDES), value=SIDES[0], label="This picture, and", elem_classes="radio-chips")
            hold = gr.Button("Compare", size="sm", elem_id="hold")
            slider = gr.ImageSlider(type="filepath", visible=False, interactive=False, elem_id="before-after", label="")
            told_here = gr.HTML()
    history, at = page.history, page.at
    history.change(on_the_wall, history, [wall, again, before_part], **PRIVATE)
    wall.select(show_picture, history, [*page.outputs[:2], at], **PRIVATE)
    page.draws(repeat.click(repeated, [history, at, page.picks], page.controls, **PRIVATE).then)
    page.draws(vary.click(varied, [history, at, page.picks], page.controls, **PRIVATE).then)
    onward.click(bind(started_from_it, session), [history, at], page.beginning, **PRIVATE)
    compared, about = (bind(before_and_after, session), [against, history, at]), STREAM | PRIVATE
    hold.click(*compared, [slider, told_here], **about).failure(lambda: "", None, told_here, **PRIVATE)
    page.stops()


def on_the_wall(history: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    wall = gr.Gallery([entry["path"] for entry in history], visible=len(history) > 1)
    return wall, gr.Row(visible=bool(history)), gr.Accordion(visible=bool(history))


def show_picture(history: Sequence[Mapping[str, Any]], event: gr.SelectData) -> tuple[str, str, int]:
    entry = history[event.index]
    return entry["path"], markup.hint(entry["words"]), event.index


def repeated(history: Sequence[Mapping[str, Any]], at: int, picks: Picks) -> tuple[Any, ...]:
    """The controls as they were for a picture of the history."""
    controls: Controls = history[at]["controls"]
    return controls._replace(picks={**picks, "picked": picked_of(controls.picks)})


def varied(history: Sequence[Mapping[str, Any]], at: int, picks: Picks) -> tuple[Any, ...]:
    """The same, but for the seed."""
    return Controls(*repeated(history, at, picks))._replace(new_seed=True)


def started_from_it(session: Session, history: Sequence[Mapping[str, Any]], at: int) -> tuple[Any, ...]:
    """A drawn picture as the start of the next one."""
    kept = session.store_upload(history[at]["path"])
    return kept.name, gr.Image(str(kept), visible=True), gr.Slider(visible=True), gr.Button(visible=True)


def before_and_after(
    session: Session, against: str, history: Sequence[Mapping[str, Any]], at: int
) -> Iterator[tuple[Any, Any]]:
    """Two pictures under one slider. "Without the concepts" is drawn now, from the same recipe and seed."""
    if not history:
        raise fusion.FusionError("Draw a picture first.")
    this, earlier = history[at], list(history[at + 1 : at + 2])
    start = this["controls"].image
    if against == SIDES[1] and not earlier:
        raise fusion.FusionError("There is no picture before this one yet; draw another.")
    if against == SIDES[2] and not start:
        raise fusion.FusionError("This picture did not start from another; choose one under 'Start from a picture'.")
    if against == SIDES[1]:
        other = earlier[0]["path"]
    elif against == SIDES[2]:
        other = str(session.upload_path(start))
    else:
        other = None
        recipe = fusion.recipe_of(this["path"])
        for frame in stream_results(session, "A picture is being drawn", lambda out: [_plain(session, recipe, out)]):
            if isinstance(frame, Result):
                (other,) = frame.value
            else:
                bar = markup.bar(frame.step, frame.total) if isinstance(frame, StepProgress) else markup.hint(frame)
                yield gr.skip(), bar
    yield gr.ImageSlider((other, this["path"]), visible=True), ""


def _plain(session: Session, recipe: fusion.Recipe, screen: ProgressStream) -> str:
    """The same prompt in the base's own words: every token becomes its noun."""
    concepts = (concept for entry in session.entries().values() for concept in entry.info.concepts)
    nouns = {concept.token: concept.noun or concept.token.strip("<>") for concept in concepts}
    prompt = re.sub(r"<[a-z0-9_-]+>", lambda token: nouns.get(token[0], token[0].strip("<>")), recipe.config.prompt)
    config = recipe.config.updated({"prompt": prompt, "regions": ()})
    pictures = fusion.generate(session.pipe, config, on_step=screen.on_step)
    return session.store_picture(pictures[recipe.index])
