"""Draw: pick concepts, see whether they go together, write a prompt, watch the picture appear."""

import html
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

import fusion
from app.notices import told, warn
from app.session import Session
from app.tabs import ONE_AT_A_TIME, QUIET

HISTORY = 24  # pictures kept on the page
TRY = "Try: "
VERDICTS = {"compatible": "Compatible", "caution": "Caution", "refused": "Cannot be combined"}
NOTHING_PICKED = '<p class="hint">Nothing picked: the base draws alone, with the words it knows already.</p>'
NO_CONCEPTS = "<h3>No concepts yet</h3><p>Show it a few pictures of something of yours, then draw with it.</p>"
STOPPED = '<p class="hint">Stopped.</p>'
NO_PICTURE = '<p class="hint">Your picture will appear here.</p>'
TAKE = '<p class="hint">One adapter file that knows all picked concepts at these strengths.</p>'


def build(session: Session) -> tuple[gr.CheckboxGroup, gr.Column, gr.Button, list[Any]]:
    """Returns what the rest of the page needs: the picks, what shows without any, its button, and usual settings."""
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=300):
            with gr.Column(visible=False, elem_classes="nothing") as no_concepts:
                gr.HTML(NO_CONCEPTS)
                teach_first = gr.Button("Teach the first one", variant="primary", elem_id="teach-first")
            picks = gr.CheckboxGroup(label="Concepts", visible=False, elem_id="picks", elem_classes="chips")
            strengths, rows = gr.JSON({}, visible=False), gr.Column(elem_id="strengths")
            verdict = gr.HTML(NOTHING_PICKED, elem_id="verdict")
            prompt = gr.Textbox("", label="Prompt", lines=2, placeholder="What should it show?", elem_id="prompt")
            example = gr.Button(visible=False, size="sm", elem_id="example", elem_classes="quiet")
            with gr.Row(elem_id="draw-row"):
                draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                stop = gr.Button("Stop", variant="stop", elem_id="stop-drawing", visible=False, scale=1, min_width=90)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                negative = gr.Textbox("", label="Negative prompt", placeholder="What should not be in it?")
                with gr.Row():
                    count = gr.Slider(1, 8, 1, step=1, label="Pictures", elem_id="count")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                    steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="draw-steps")
                    guidance = gr.Slider(1, 20, 3, step=0.5, label="Guidance")
                anew = gr.Checkbox(True, label="A new seed each time", container=False, elem_id="anew")
            with gr.Accordion("Take this combination with you", open=False, elem_id="take"):
                gr.HTML(TAKE)
                fuse = gr.Button("Fuse into one file", size="sm", elem_id="fuse")
                file = gr.File(label="Adapter", interactive=False, visible=False, elem_id="fused-file")
        with gr.Column(scale=6, min_width=300, elem_id="easel"):
            looks: dict[str, Any] = {"show_label": False, "interactive": False}
            stage = gr.Image(type="filepath", buttons=["download", "fullscreen"], elem_id="stage", **looks)
            caption = gr.HTML(NO_PICTURE, elem_id="caption")
            wall = gr.Gallery(columns=6, height="auto", allow_preview=False, visible=False, elem_id="wall", **looks)
    pictures = gr.State([])
    with rows:
        rendered = gr.render([picks, strengths], [picks.change], show_progress="hidden")
        rendered(lambda keys, values: strength_rows(session, keys, values, prompt, strengths))
    picks.change(told(picked, session), [picks, prompt, example], [verdict, prompt, example], **QUIET)
    example.click(lambda text: text.removeprefix(TRY), example, prompt, **QUIET)
    started = gr.on([draw.click, prompt.submit], lambda: working(True), None, [draw, stop], **QUIET)
    inputs = [picks, strengths, prompt, negative, seed, anew, steps, guidance, count, pictures]
    outputs = [stage, caption, wall, pictures]
    drawing = started.then(told(draw_pictures, session), inputs, outputs, api_name="draw", **ONE_AT_A_TIME)
    drawing.then(lambda: working(False), None, [draw, stop], **QUIET)  # gradio 6.31: not after a failure
    drawing.failure(lambda: (*working(False), NO_PICTURE), None, [draw, stop, caption], **QUIET)
    stop.click(lambda: (*working(False), STOPPED), None, [draw, stop, caption], cancels=[drawing], **QUIET)
    wall.select(shown, pictures, [stage, caption], **QUIET)
    fuse.click(told(fused, session), [picks, strengths], file, api_name="fuse")
    return picks, no_concepts, teach_first, [steps, guidance]


def strength_rows(session: Session, keys: list[str], values: Mapping[str, float], prompt: Any, strengths: Any) -> None:
    """For every picked concept a row: buttons that put its tokens into the prompt, and its strength."""
    looks: dict[str, Any] = {"container": False, "buttons": [], "interactive": True, "step": 0.05}
    for key, adapter in zip(keys, session.adapters(keys), strict=True):
        with gr.Row(elem_classes="strength"):
            for token in tokens_of(adapter.info):
                insert = gr.Button(f"+ {token}", size="sm", min_width=90, scale=0, elem_classes="token")
                insert.click(lambda text, word=token: f"{text.rstrip()} {word}".strip(), prompt, prompt, **QUIET)
            slider = gr.Slider(0, 1.5, values.get(key, 1.0), label=f"Strength of {key}", **looks)
            slider.release(lambda old, new, key=key: {**old, key: new}, [strengths, slider], strengths, **QUIET)


def picked(session: Session, keys: list[str], prompt: str, example: str) -> tuple[str, Any, Any]:
    """The verdict on a selection, and an example for it, put into a prompt that holds nothing of one's own yet."""
    suggestion = example_prompt([token for adapter in session.adapters(keys) for token in tokens_of(adapter.info)])
    own_words = bool(prompt.strip()) and prompt != example.removeprefix(TRY)
    button = gr.Button(f"{TRY}{suggestion}", visible=own_words and bool(suggestion))
    return verdict_html(session, keys), gr.skip() if own_words else suggestion, button


def verdict_html(session: Session, keys: list[str]) -> str:
    if not keys:
        return NOTHING_PICKED
    found = fusion.compatibility(session.adapters(keys), session.pipe)
    more = "".join(f"<p>{html.escape(text)}</p>" for text in [*found.problems[1:], *found.advice])
    said = f"<b>{VERDICTS[found.verdict]}</b> {html.escape(found.sentence)}{more}"
    return f'<div class="verdict {found.verdict}" role="status">{said}</div>'


def draw_pictures(
    session: Session,
    keys: list[str],
    strengths: Mapping[str, float],
    prompt: str,
    negative: str = "",
    seed: float = 0,
    new_seed: bool = True,
    steps: float | None = None,
    guidance: float | None = None,
    count: float = 1,
    pictures: Sequence[tuple[str, str]] = (),
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Draw a prompt with the picked concepts: previews while it is drawn, then the pictures."""
    if not prompt.strip():
        raise fusion.FusionError("Write a prompt first: what should the picture show?")
    adapters = session.adapters(keys)
    gated = [token for adapter in adapters if adapter.gated for token in tokens_of(adapter.info)]
    if unused := [token for token in gated if token not in prompt]:
        warn(f"The prompt does not mention {' or '.join(unused)}, so nothing of that is drawn.")
    yield gr.skip(), progress_html(0, 1), gr.skip(), gr.skip()
    work = partial(
        fusion.generate,
        session.pipe,
        prompt,
        adapters=adapters,
        strengths=[strengths.get(key, 1.0) for key in keys],
        negative_prompt=negative,
        seed=random.randrange(2**31) if new_seed else int(seed),
        batch=int(count),
        steps=int(steps) if steps else None,
        guidance_scale=guidance,
    )
    for frame in session.draw(work):
        if frame.pictures:
            kept = [*frame.pictures, *pictures][:HISTORY]
            wall = gr.Gallery([path for path, _ in kept], visible=len(kept) > 1)
            yield kept[0][0], recipe_html(kept[0][1]), wall, kept
        else:
            yield frame.preview or gr.skip(), progress_html(frame.step, frame.total), gr.skip(), gr.skip()


def fused(session: Session, keys: list[str], strengths: Mapping[str, float]) -> Any:
    """The picked concepts as one adapter file."""
    return gr.File(str(session.fused(keys, [strengths.get(key, 1.0) for key in keys])), visible=True)


def shown(pictures: list[tuple[str, str]], event: gr.SelectData) -> tuple[str, str]:
    path, recipe = pictures[event.index]
    return path, recipe_html(recipe)


def example_prompt(tokens: Sequence[str]) -> str:
    """A first prompt for a selection, in words that a small base too understands."""
    if len(tokens) < 2:
        return f"a {tokens[0]} on a blue background" if tokens else ""
    rest = "".join(f" and a {token}" for token in tokens[2:])
    return f"a {tokens[0]} on the left and a {tokens[1]} on the right{rest} on a red background"


def tokens_of(info: Any) -> list[str]:
    return [concept.token for concept in info.concepts]


def working(busy: bool) -> tuple[Any, Any]:
    return gr.Button(interactive=not busy), gr.Button(visible=busy)


def recipe_html(recipe: str) -> str:
    return f'<p class="hint">{html.escape(recipe)}</p>'


def progress_html(step: float, total: float) -> str:
    return f'<div class="bar" role="progressbar"><i style="width:{100 * step / max(1, total):.1f}%"></i></div>'
