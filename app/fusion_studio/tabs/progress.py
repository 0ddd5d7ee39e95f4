"""What is being taught, as everyone sees it: loss, previews, the queue, and at the end references beside results."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from fusion_studio import markup
from fusion_studio.session import Session
from fusion_studio.training_jobs import TrainingJob, TrainingQueue

REFRESH = 0.4  # seconds
SHARED = "Everyone who has this page open sees what is being taught, and can pause or stop it."


def watch(session: Session) -> Iterator[tuple[Any, ...]]:
    """What is being taught, until all is done; a page opened in the middle joins in."""
    teaching: TrainingQueue | None = session.trainings
    drawn: tuple[Any, int] = (None, 0)
    while teaching is not None and teaching.running:
        now = teaching.now
        seen = (now, len(now.previews) if now else 0)
        yield view(teaching, new_previews=seen != drawn)
        drawn = seen
        teaching.changed.wait(REFRESH)
        teaching.changed.clear()
    yield (gr.skip(),) * 9 if teaching is None else view(teaching, new_previews=True)


def view(teaching: TrainingQueue, *, new_previews: bool) -> tuple[Any, ...]:
    """Values for the views; pictures only when there are new ones, so that they do not flicker."""
    own, stopping = teaching.now, teaching.stop.is_set()
    if own is None:
        return (gr.skip(),) * 9
    active, previews = own.state in ("preparing", "learning"), list(own.previews)
    return (
        state_html(own, paused=not teaching.going.is_set()),
        markup.loss_svg(list(own.losses), own.total - own.begun) if len(own.losses) > 1 else "",
        gr.Row(visible=active),
        gr.Gallery(previews, visible=bool(previews)) if new_previews else gr.skip(),
        ending_html(own),
        gr.Button(f"Draw with {own.token}", visible=own.saved is not None),
        queue_html(teaching),
        gr.Button("Pause" if teaching.going.is_set() else "Go on"),
        gr.Button("Stopping …" if stopping and active else "Stop and keep", interactive=not stopping),
    )


def state_html(own: TrainingJob, *, paused: bool = False) -> str:
    kept = "what it knows so far is in the library." if own.saved else "it had learned nothing yet."
    left = own.seconds / max(1, own.step - own.begun) * (own.total - own.step)
    line = {
        "waiting": "waits for its turn",
        "preparing": "Looking at the pictures …",
        "learning": f"Step {own.step} of {own.total}, {'paused' if paused else f'about {markup.in_time(left)} left'}",
        "learned": f"Learned in {own.step} steps and {markup.in_time(own.seconds)}; it is in the library now.",
        "stopped": f"Stopped after {own.step} steps; {kept}",
        "failed": own.error,
    }[own.state]
    said = f"<p><b>{markup.escape(own.token)}</b> {markup.escape(line)}</p>"
    # A live region only where something has happened: a screen reader would read every step aloud.
    role = "" if own.state == "learning" else ' role="status"'
    return f'<div class="teaching {own.state}"{role}>{said}{markup.bar(own.step, own.total)}</div>'


def ending_html(own: TrainingJob) -> str:
    """References and results side by side, and what to try if they are not alike."""
    if own.saved is None:
        return ""
    results = [image for image, _ in own.previews[-1:]]
    sides = markup.pictures_row("What you showed", own.references) + markup.pictures_row("What it draws", results)
    return f'<div class="ending">{sides}</div>{markup.hint(advice(own))}'


def advice(own: TrainingJob) -> str:
    """What most likely helps a concept that looks weak."""
    if own.state == "stopped" and own.step < own.total / 2:
        return "Looks weak? It was stopped early: teach it again and let it go on for longer."
    if own.pictures < 4:
        return "Looks weak? More pictures help most: four to eight, on different backgrounds."
    quarter = max(1, len(own.losses) // 4)
    before, last = own.losses[-2 * quarter : -quarter], own.losses[-quarter:]
    if before and sum(last) / len(last) < 0.97 * sum(before) / len(before):
        return "Looks weak? The loss was still falling: teach it again on Careful."
    return "Looks weak? Try Careful, a higher strength when drawing, or captions that name all else in a picture."


def queue_html(teaching: TrainingQueue) -> str:
    """Who is next."""
    waiting = [own for own in teaching.jobs if own.state == "waiting"]
    rows = "".join(f"<li>{markup.escape(own.token)} <small>{own.total} steps</small></li>" for own in waiting)
    return f'<div class="queue"><h4>Next</h4><ol>{rows}</ol>{markup.hint(SHARED)}</div>' if waiting else ""
