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
from fusion_studio.regions import MAX_REGIONS, as_entry
from fusion_studio.session import Session
from fusion_studio.streaming import ProgressStream, Result, StepProgress, stream_results
from fusion_studio.tabs import PRIVATE, STREAM, Controls, Picks, picked_of

SIDES = ("without the concepts", "the picture before", "the picture it started from")


def build(session: Session, page: SimpleNamespace) -> None:
    with page.after:
        options: dict[str, Any] = {"show_label": False, "interactive": False, "allow_preview": False}
        gallery = gr.Gallery(columns=6, height="auto", visible=False, elem_id="wall", **options)
        with gr.Row(visible=False, elem_id="again") as again:
            repeat = gr.Button("Repeat", size="sm", elem_id="repeat", min_width=90)
            vary = gr.Button("Another seed", size="sm", elem_id="vary", min_width=90)
            onward = gr.Button("Start from it", size="sm", elem_id="onward", min_width=90)
            edit = gr.Button("Edit its regions", size="sm", elem_id="edit-regions", min_width=90)
        with gr.Accordion("Before and after", open=False, visible=False, elem_id="before-part") as before_part:
            side = gr.Radio(list(SIDES), value=SIDES[0], label="Compare this picture with", elem_classes="radio-chips")
            compare = gr.Button("Compare", size="sm", elem_id="hold")
            slider = gr.ImageSlider(type="filepath", visible=False, interactive=False, elem_id="before-after", label="")
            status = gr.HTML()
    history, at = page.history, page.at
    history.change(history_views, history, [gallery, again, before_part], **PRIVATE)
    gallery.select(select_entry, history, [*page.outputs[:2], at], **PRIVATE)
    page.draws(repeat.click(controls_of, [history, at, page.picks], page.controls, **PRIVATE).then)
    page.draws(vary.click(controls_with_new_seed, [history, at, page.picks], page.controls, **PRIVATE).then)
    onward.click(bind(start_from_entry, session), [history, at], page.beginning, **PRIVATE)
    parts = [page.regions, page.regions_part]
    edit.click(bind(regions_of_entry, session), [history, at, page.regions], parts, **PRIVATE)
    handler, events = (bind(before_and_after, session), [side, history, at]), STREAM | PRIVATE
    compare.click(*handler, [slider, status], **events).failure(lambda: "", None, status, **PRIVATE)
    page.stops()


def history_views(history: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    gallery = gr.Gallery([entry["path"] for entry in history], visible=len(history) > 1)
    return gallery, gr.Row(visible=bool(history)), gr.Accordion(visible=bool(history))


def select_entry(history: Sequence[Mapping[str, Any]], event: gr.SelectData) -> tuple[str, str, int]:
    entry = history[event.index]
    return entry["path"], markup.hint(entry["words"]), event.index


def controls_of(history: Sequence[Mapping[str, Any]], at: int, picks: Picks) -> tuple[Any, ...]:
    """The controls as they were for a picture of the history."""
    controls: Controls = history[at]["controls"]
    return controls._replace(picks={**picks, "picked": picked_of(controls.picks)})


def controls_with_new_seed(history: Sequence[Mapping[str, Any]], at: int, picks: Picks) -> tuple[Any, ...]:
    """The same, but for the seed."""
    return Controls(*controls_of(history, at, picks))._replace(new_seed=True)


def start_from_entry(session: Session, history: Sequence[Mapping[str, Any]], at: int) -> tuple[Any, ...]:
    """A drawn picture as the start of the next one."""
    upload = session.store_upload(history[at]["path"])
    return upload.name, gr.Image(str(upload), visible=True), gr.Slider(visible=True), gr.Button(visible=True)


def regions_of_entry(session: Session, history: Sequence[Mapping[str, Any]], at: int, value: Any) -> tuple[Any, Any]:
    """The regions of a drawn picture, those that the base found too, where they can be edited for the next one."""
    if not history:
        raise fusion.FusionError("Draw a picture first.")
    regions = fusion.recipe_of(history[at]["path"]).config.regions
    if regions == "auto" or not regions:
        raise fusion.FusionError("This picture has no regions: they are found for two or more concepts in a prompt.")
    if len(regions) > MAX_REGIONS:
        raise fusion.FusionError(f"{len(regions)} regions are too many; {MAX_REGIONS} is the limit.")
    return {**(value or {}), "regions": [as_entry(region) for region in regions]}, gr.Accordion(open=True)


def before_and_after(
    session: Session, side: str, history: Sequence[Mapping[str, Any]], at: int
) -> Iterator[tuple[Any, Any]]:
    """Two pictures under one slider. "Without the concepts" is drawn now, from the same recipe and seed."""
    if not history:
        raise fusion.FusionError("Draw a picture first.")
    entry, earlier = history[at], list(history[at + 1 : at + 2])
    start = entry["controls"].image
    if side == SIDES[1] and not earlier:
        raise fusion.FusionError("There is no picture before this one yet; draw another.")
    if side == SIDES[2] and not start:
        raise fusion.FusionError("This picture did not start from another; choose one under 'Start from a picture'.")
    if side == SIDES[1]:
        other = earlier[0]["path"]
    elif side == SIDES[2]:
        other = str(session.upload_path(start))
    else:
        other = None
        recipe = fusion.recipe_of(entry["path"])
        for frame in stream_results(session, "A picture is being drawn", lambda out: [_plain(session, recipe, out)]):
            if isinstance(frame, Result):
                (other,) = frame.value
            else:
                bar = markup.bar(frame.step, frame.total) if isinstance(frame, StepProgress) else markup.hint(frame)
                yield gr.skip(), bar
    yield gr.ImageSlider((other, entry["path"]), visible=True), ""


def _plain(session: Session, recipe: fusion.Recipe, screen: ProgressStream) -> str:
    """The same prompt in the base's own words: every token becomes its noun."""
    concepts = (concept for entry in session.entries().values() for concept in entry.info.concepts)
    nouns = {concept.token: concept.noun or concept.token.strip("<>") for concept in concepts}
    prompt = re.sub(r"<[a-z0-9_-]+>", lambda token: nouns.get(token[0], token[0].strip("<>")), recipe.picture_prompt)
    config = recipe.config.updated({"prompt": prompt, "regions": ()})
    pictures = fusion.generate(session.pipe, config, on_step=screen.on_step)
    return session.store_picture(pictures[recipe.index])
