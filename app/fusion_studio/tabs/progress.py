"""The training under way, as everyone sees it: loss, previews, the queue, and at the end references beside results."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from fusion_studio import markup
from fusion_studio.session import Session
from fusion_studio.training_jobs import TrainingJob, current_training, taught_tokens, trainings

REFRESH = 0.4  # seconds
SHARED_HINT = "Everyone who has this page open sees what is being taught, and can pause or stop it."


def watch(session: Session) -> Iterator[tuple[Any, ...]]:
    """The trainings until all are done; a page opened in the middle joins in."""
    on_page: tuple[Any, int] = (None, 0)
    while taught_tokens(session):
        job = current_training(session)
        previews = (job, len(job.previews) if job else 0)
        yield view(session, new_previews=previews != on_page)
        on_page = previews
        session.jobs.changed.wait(REFRESH)
        session.jobs.changed.clear()
    yield view(session, new_previews=True)


def view(session: Session, *, new_previews: bool) -> tuple[Any, ...]:
    """Values for the views; pictures only when there are new ones, so that they do not flicker."""
    job = current_training(session)
    if job is None:
        return (gr.skip(),) * 9
    stopping, paused = job.stop.is_set(), job.paused
    previews = list(job.previews)
    return (
        state_html(job, paused=paused),
        markup.loss_svg(list(job.losses), job.total - job.start) if len(job.losses) > 1 else "",
        gr.Row(visible=job.active),
        gr.Gallery(previews, visible=bool(previews)) if new_previews else gr.skip(),
        result_html(job),
        gr.Button(f"Draw with {job.token}", visible=job.saved is not None),
        queue_html(session),
        gr.Button("Go on" if paused else "Pause"),
        gr.Button("Stopping …" if stopping and job.active else "Stop and keep", interactive=not stopping),
    )


def state_html(job: TrainingJob, *, paused: bool = False) -> str:
    outcome = "what it knows so far is in the library." if job.saved else "it had learned nothing yet."
    text = {
        "waiting": "waits for its turn",
        "preparing": job.phase or "Reading the pictures …",
        "learning": f"Step {job.step} of {job.total}, {'paused' if paused else markup.time_left(job.time_left)}",
        "learned": f"Learned in {job.step} steps and {markup.in_time(job.seconds)}; it is in the library now.",
        "stopped": f"Stopped after {job.step} steps; {outcome}",
        "failed": job.error,
    }[job.state]
    line = f"<p><b>{markup.escape(job.token)}</b> {markup.escape(text)}</p>"
    # A live region only where something has happened: a screen reader would read every step aloud.
    role = "" if job.state == "learning" else ' role="status"'
    return f'<div class="teaching {job.state}"{role}>{line}{markup.bar(job.step, job.total)}</div>'


def result_html(job: TrainingJob) -> str:
    """References and results side by side, and what to try if they are not alike."""
    if job.saved is None:
        return ""
    results = [image for image, _ in job.previews[-1:]]
    sides = markup.pictures_row("Your pictures", job.references) + markup.pictures_row("What it draws", results)
    return f'<div class="result">{sides}</div>{markup.hint(advice(job))}'


def advice(job: TrainingJob) -> str:
    """What most likely helps a concept that looks weak."""
    if job.state == "stopped" and job.step < job.total / 2:
        return "Looks weak? It was stopped early: teach it again and let it go on for longer."
    if job.pictures < 4:
        return "Looks weak? More pictures help most: four to eight, on different backgrounds."
    quarter = max(1, len(job.losses) // 4)
    before, last = job.losses[-2 * quarter : -quarter], job.losses[-quarter:]
    if before and sum(last) / len(last) < 0.97 * sum(before) / len(before):
        return "Looks weak? The loss was still falling: teach it again on Careful."
    return "Looks weak? Try Careful, a higher strength when drawing, or captions that name all else in a picture."


def queue_html(session: Session) -> str:
    """The trainings that wait."""
    waiting = [job for job in trainings(session) if job.state == "waiting"]
    rows = "".join(f"<li>{markup.escape(job.token)} <small>{job.total} steps</small></li>" for job in waiting)
    return f'<div class="queue"><h4>Next</h4><ol>{rows}</ol>{markup.hint(SHARED_HINT)}</div>' if waiting else ""
