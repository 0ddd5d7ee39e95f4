"""Teach: pictures and a name in; a loss that falls and previews that grow alike; stop whenever it looks right."""

import html
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import fusion
from app.notices import told, warn
from app.session import Session
from app.tabs import QUIET, WATCH
from app.tabs.draw import progress_html
from app.teaching import ENDINGS, Teaching, lesson

PRESETS = {"Quick": 0.4, "Standard": 1.0, "Careful": 2.0}  # of the base's usual number of steps
FEW = 3  # pictures
REFRESH = 0.4  # seconds
TYPES = ("additive", "guarded", "rotational", "core", "singular_values", "lora", "orthogonal")
WIDTH, HEIGHT = 600, 120  # of the loss plot
IDLE = (
    '<div class="nothing"><h3>Nothing is being taught</h3><p>Four to eight pictures are enough: the same thing on '
    "different backgrounds. Its loss and first drawings will appear here.</p></div>"
)
OURS = '<p class="hint">No pictures at hand? Try one of ours:</p>'


def build(session: Session) -> tuple[gr.Number, list[Any], Any, gr.Button]:
    """Returns what the rest of the page needs: steps, the views of a training, the event after it, "Draw with it"."""
    examples = example_concepts()
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=300):
            looks: dict[str, Any] = {"height": 250, "object_fit": "cover", "columns": 4, "sources": ["upload"]}
            pictures = gr.Gallery(label="Pictures of it", file_types=list(ENDINGS), elem_id="pictures", **looks)
            gr.HTML(OURS, visible=bool(examples))
            with gr.Row(elem_classes="examples", visible=bool(examples)):
                chosen = [gr.Button(name, size="sm", elem_classes="quiet", min_width=64, scale=0) for name in examples]
            with gr.Row():
                noun = gr.Textbox("", label="What is it?", info="One ordinary word", placeholder="dog", elem_id="noun")
                token = gr.Textbox("", label="Its name", info="For prompts", placeholder="<rex>", elem_id="token")
            preset = gr.Radio(list(PRESETS), value="Standard", label="How thoroughly", elem_classes="chips")
            with gr.Accordion("Settings", open=False, elem_id="teach-settings"), gr.Row():
                steps = gr.Number(label="Steps", precision=0, minimum=1, elem_id="steps", min_width=90)
                kind = gr.Dropdown(list(TYPES), value="additive", label="Adapter type", min_width=140)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
            with gr.Row():
                start = gr.Button("Teach", variant="primary", elem_id="teach", scale=3)
                stop = gr.Button("Stop and keep", variant="stop", visible=False, elem_id="stop-teaching", min_width=150)
        with gr.Column(scale=6, min_width=300):
            progress, loss = gr.HTML(IDLE, elem_id="progress"), gr.HTML(visible=False, elem_id="loss")
            looks = {"columns": 5, "fit_columns": False, "height": "auto", "elem_id": "previews", "visible": False}
            previews = gr.Gallery(label="What it draws so far", allow_preview=False, interactive=False, **looks)
            use = gr.Button("Draw with it", variant="primary", visible=False, elem_id="use")
    views = [progress, loss, previews, start, stop, use]
    preset.change(lambda name: max(1, round(session.usual()[0] * PRESETS[name])), preset, steps, **QUIET)
    noun.blur(suggested_token, [noun, token], token, **QUIET)
    for button, folder in zip(chosen, examples.values(), strict=True):
        button.click(told(example_lesson, session, folder), None, [pictures, noun, token], **QUIET)
    inputs = [pictures, token, noun, steps, kind, seed]
    ended = start.click(told(teach_concept, session), inputs, views, api_name="teach", **WATCH)
    stop.click(told(stop_teaching, session), None, stop, api_name="stop_teaching", **WATCH)
    return steps, views, ended, use


def teach_concept(
    session: Session,
    pictures: list[tuple[str, str | None]] | None,
    token: str,
    noun: str,
    steps: float | None = None,
    adapter_type: str = "additive",
    seed: float = 0,
) -> Iterator[tuple[Any, ...]]:
    """Teach a concept from pictures; yields its progress until it has been learned or stopped."""
    if 0 < len(pictures or ()) < FEW:
        warn(f"{FEW} or more pictures work better.")
    name, total = suggested_token(noun, token), int(steps or session.usual()[0])
    Teaching(session, lesson(session, pictures or (), name, noun, total, adapter_type, int(seed)))
    yield from watch(session)


def watch(session: Session) -> Iterator[tuple[Any, ...]]:
    """What the latest training shows, until it ends; a page opened in the middle joins in."""
    teaching, shown = session.teaching, 0
    while teaching is not None and teaching.running:
        yield view(teaching, new_previews=len(teaching.previews) > shown)
        shown = len(teaching.previews)
        teaching.ended.wait(REFRESH)
    yield (gr.skip(),) * 6 if teaching is None else view(teaching, new_previews=True)


def stop_teaching(session: Session) -> Any:
    """Stop the present training after its step; what was learned so far is kept in the library."""
    if session.teaching is not None:
        session.teaching.stop.set()
    return gr.Button("Stopping …", interactive=False)


def view(teaching: Teaching, *, new_previews: bool) -> tuple[Any, ...]:
    """Values for the views; pictures only when there are new ones, so that they do not flicker."""
    running, stopping, previews = teaching.running, teaching.stop.is_set(), list(teaching.previews)
    return (
        state_html(teaching),
        gr.HTML(loss_svg(list(teaching.losses), teaching.total), visible=len(teaching.losses) > 1),
        gr.Gallery(previews, visible=bool(previews)) if new_previews else gr.skip(),
        gr.Button(interactive=not running),
        gr.Button("Stopping …" if stopping else "Stop and keep", visible=running, interactive=not stopping),
        gr.Button(f"Draw with {teaching.config.token}", visible=teaching.saved is not None),
    )


def state_html(teaching: Teaching) -> str:
    left = teaching.seconds / max(1, teaching.step) * (teaching.total - teaching.step)
    line = {
        "preparing": "Looking at the pictures …",
        "learning": f"Step {teaching.step} of {teaching.total}, about {in_time(left)} left",
        "learned": f"Learned in {teaching.step} steps and {in_time(teaching.seconds)}; it is in the library now.",
        "stopped": f"Stopped after {teaching.step} steps; what it knows so far is in the library.",
        "failed": teaching.error,
    }[teaching.state]
    said = f"<p><b>{html.escape(teaching.config.token)}</b> {html.escape(line)}</p>"
    bar = progress_html(teaching.step, teaching.total)
    return f'<div class="teaching {teaching.state}" role="status">{said}{bar}</div>'


def loss_svg(losses: list[float], total: int) -> str:
    """The loss, faint, and its running mean; drawn by hand so that it follows the theme and does not flicker."""
    means = losses[:1]
    for value in losses[1:]:
        means.append(means[-1] + max(0.08, 1 / (len(means) + 1)) * (value - means[-1]))
    across, down = WIDTH / max(1, total - 1), HEIGHT / (1.05 * max(losses, default=1.0) or 1.0)
    lines = ""
    for name, values in (("raw", losses), ("mean", means)):
        picked = range(0, len(values), max(1, len(values) // WIDTH))
        points = " ".join(f"{across * i:.1f},{HEIGHT - down * values[i]:.1f}" for i in picked)
        lines += f'<polyline class="{name}" points="{points}"/>'
    figure = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{lines}</svg>'
    return f'<figure class="loss"><figcaption>Loss <b>{means[-1] if means else 0:.3f}</b></figcaption>{figure}</figure>'


def in_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def suggested_token(noun: str, token: str) -> str:
    """A name from the noun, where none has been given."""
    return token or (f"<my-{'-'.join(noun.lower().split())}>" if noun.strip() else "")


def example_concepts() -> dict[str, Path]:
    """Example folders that come with a checkout, by name."""
    folder = Path(fusion.__file__).parent.parent / "assets" / "concepts"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/concept.toml"))}


def example_lesson(session: Session, folder: Path) -> tuple[list[tuple[str, str]], str, str]:
    """Pictures with captions, noun and token of an example; copied to where the page may show them from."""
    about = tomllib.loads((folder / "concept.toml").read_text(encoding="utf-8"))
    pictures: list[tuple[str, str]] = []
    for source in sorted(path for path in folder.iterdir() if path.suffix in ENDINGS):
        copied = session.folder / f"{folder.name}-{source.name}"
        copied.write_bytes(source.read_bytes())
        caption = source.with_suffix(".txt")
        pictures.append((str(copied), caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""))
    return pictures, about["noun"], about["token"]
