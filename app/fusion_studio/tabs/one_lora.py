"""One LoRA for other programs: made of the picked concepts, its numbers, its files, and how to use them."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import commands, markup
from fusion_studio.distillation_jobs import (
    THOROUGHNESS,
    DistillationJob,
    current_distillation,
    discard_distillation,
    export_lora,
    resume_distillation,
    unfinished_distillations,
)
from fusion_studio.errors import bind
from fusion_studio.session import Session, safe_name
from fusion_studio.tabs import PRIVATE, STREAM, Picks, command_line, picked_of

REFRESH = 0.4  # seconds
ABOUT = (
    "A plain LoRA that does what these concepts do together here, and leaves other words alone, for programs that know "
    "no gates. It is learned from prompts, without pictures: in minutes for pocket, in about an hour for Stable "
    "Diffusion 1.5 without a graphics card. Everyone goes on drawing meanwhile."
)
FORMS = {"ComfyUI": "kohya", "A1111, Forge": "kohya", "diffusers": "diffusers"}
MAX_ERROR = 0.1  # above it, more is lost than a picture hides
WEAK = "Much is lost. Make it again on Careful, with a larger rank, or of fewer concepts."
RANK_HINT = "64 is enough for sixteen concepts; smaller files are a little less exact"
PROMPTS_HINT = "One a line, {token} where a concept stands. Learned among the others."


def build_form() -> SimpleNamespace:
    """What is set before it begins."""
    with gr.Accordion("One LoRA for other programs", open=False, elem_id="one-lora-part"):
        gr.HTML(markup.hint(ABOUT))
        choices = [(name.capitalize(), name) for name in THOROUGHNESS]
        chips: dict[str, Any] = {"elem_classes": "radio-chips"}
        thoroughness = gr.Radio(choices, value="standard", label="How thoroughly", **chips)
        rank = gr.Number(64, label="Rank", precision=0, minimum=1, maximum=320, info=RANK_HINT, elem_id="lora-rank")
        with gr.Accordion("Prompts of your own", open=False):
            prompts = gr.Textbox(
                "", show_label=False, lines=3, placeholder="a photo of {token} in the snow", info=PROMPTS_HINT,
                elem_id="lora-prompts",
            )  # fmt: skip
        start = gr.Button("Make one LoRA", variant="primary", elem_id="make-lora")
    return SimpleNamespace(inputs=[thoroughness, rank, prompts], start=start)


def build_views() -> SimpleNamespace:
    """Progress, and the result."""
    with gr.Column(visible=False, elem_id="one-lora") as panel:
        state = gr.HTML(elem_id="lora-state")
        with gr.Row(visible=False) as control:
            stop = gr.Button("Stop", variant="stop", size="sm", elem_id="stop-lora", min_width=90)
        with gr.Row(visible=False) as unfinished:
            resume = gr.Button("Go on", variant="primary", size="sm", elem_id="resume-lora", min_width=90)
            discard = gr.Button("Discard", size="sm", elem_id="discard-lora", elem_classes="quiet", min_width=90)
        with gr.Column(visible=False) as result:
            chips: dict[str, Any] = {"elem_classes": "radio-chips", "elem_id": "program"}
            program = gr.Radio(list(FORMS), value="ComfyUI", label="Use it in", **chips)
            files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="lora-files")
            guide = gr.HTML(elem_id="guide")
            options: dict[str, Any] = {"lines": 1, "max_lines": 16, "interactive": False, "buttons": ["copy"]}
            text = gr.Textbox(label="Prompt", elem_id="guide-text", elem_classes="cli", **options)
    return SimpleNamespace(
        views=[panel, state, control, stop, unfinished, result, files, guide, text],
        program=program, stop=stop, resume=resume, discard=discard,
    )  # fmt: skip


def connect(session: Session, picks: Any, name: Any, form: SimpleNamespace, parts: SimpleNamespace, cli: Any) -> Any:
    """The events; returns the last of them, after which the library may have a new file, and the one for new pages."""
    watching = (bind(watch_distilling, session), parts.program, parts.views)
    begun = form.start.click(bind(make_lora, session), [picks, name, *form.inputs], cli, api_name="one_lora")
    resumed = parts.resume.click(bind(go_on, session), None, None, **PRIVATE)
    finished = [
        begun.then(*watching, api_name="watch_one_lora", **STREAM),
        resumed.then(*watching, **STREAM | PRIVATE),
    ]
    parts.stop.click(bind(stop_distilling, session), None, parts.stop, api_name="stop_one_lora", show_progress="hidden")
    parts.discard.click(bind(discard, session), None, None, **PRIVATE).then(*watching, **STREAM | PRIVATE)
    guide_views = parts.views[-3:]
    parts.program.change(bind(show_program, session), parts.program, guide_views, **PRIVATE)
    return SimpleNamespace(finished=finished, watching=watching)


def make_lora(
    session: Session, picks: Picks, name: str = "", thoroughness: str = "standard", rank: float | None = None,
    prompts: str = "",
) -> Any:  # fmt: skip
    """Put the picked concepts into the queue, to be learned by one plain LoRA. Returns the command line."""
    picked = picked_of(picks)
    title = name or ("_".join(picked) if len(picked) <= 3 else f"{len(picked)}_concepts")
    title = safe_name(title).replace("+", "_")  # a plus sign in a word of a prompt is a weight in InvokeAI
    if any(job.name == title for job in session.jobs.unfinished if isinstance(job, DistillationJob)):
        raise fusion.FusionError(f"'{title}' is being learned already; give this one another name.")
    job = DistillationJob(session, picked, title, thoroughness, int(rank) if rank else None, prompts)
    session.jobs.add(job)
    return command_line(commands.distill(session, job.picked, job.name, job.settings, own_prompts=bool(job.prompts)))


def go_on(session: Session) -> None:
    """Go on with the newest unfinished one, from its latest checkpoint."""
    session.jobs.add(resume_distillation(session, _newest(session)))


def discard(session: Session) -> None:
    """Delete the newest unfinished one."""
    discard_distillation(session, _newest(session))


def _newest(session: Session) -> str:
    names = list(unfinished_distillations(session))
    if not names:
        raise fusion.FusionError("Nothing is unfinished any more.")
    return names[-1]


def stop_distilling(session: Session) -> Any:
    """Stop the present one after its step; it can be gone on with from its latest checkpoint."""
    job = current_distillation(session)
    if job is not None:
        job.stop.set()
    return gr.Button("Stopping …", interactive=False)


def watch_distilling(session: Session, program: str = "ComfyUI") -> Iterator[tuple[Any, ...]]:
    """The present one until it ends; a page opened in the middle joins in."""
    while (job := current_distillation(session)) and job in session.jobs.unfinished:
        yield view(session, job, program)
        session.jobs.changed.wait(REFRESH)
        session.jobs.changed.clear()
    yield view(session, current_distillation(session), program)


def view(session: Session, job: DistillationJob | None, program: str) -> tuple[Any, ...]:
    """Values for the views; the files only once there are some."""
    busy = job is not None and job in session.jobs.unfinished
    unfinished = list(unfinished_distillations(session))
    finished = job is not None and job.adapter is not None and not busy
    text = state_html(session, job) if job else ""
    if unfinished and not busy and (job is None or job.name != unfinished[-1]):
        text += markup.hint(f"Not finished yet: {unfinished[-1]}.")
    stopping = job is not None and busy and job.stop.is_set()
    stop = gr.Button("Stopping …" if stopping else "Stop", interactive=not stopping)
    guide = show_program(session, program) if finished else (gr.skip(),) * 3
    return (
        gr.Column(visible=bool(job or unfinished)), text, gr.Row(visible=busy), stop,
        gr.Row(visible=bool(unfinished) and not busy), gr.Column(visible=finished), *guide,
    )  # fmt: skip


def state_html(session: Session, job: DistillationJob) -> str:
    left = markup.time_left(job.time_left)
    ahead = next((other.activity for other in session.jobs.unfinished if other is not job and other.active), "")
    text = {
        "waiting": f"waits for its turn. {ahead}.",
        "preparing": "The concepts are being asked for what they do …",
        "learning": f"Step {job.step} of {job.total}, {left}",
        "drawing": "Learned; two pictures are being drawn to compare …",
        "learned": f"Learned in {job.step} steps and {markup.in_time(job.seconds)}; it is in the library, too.",
        "stopped": f"Stopped after {job.step} of {job.total} steps.",
        "failed": job.error,
    }[job.state]
    role = "" if job.state == "learning" else ' role="status"'
    line = f"<p><b>{markup.escape(job.title)}</b> {markup.escape(text)}</p>"
    bar = markup.bar(job.step, job.total) if job.state != "learned" else ""
    return f'<div class="teaching {job.state}"{role}>{line}{bar}</div>{result_html(job)}'


def result_html(job: DistillationJob) -> str:
    """What it keeps, in one line and as a table, and one prompt drawn in both ways."""
    if job.adapter is None or job.errors is None:
        return ""
    errors, sentence = job.errors, job.errors.sentence(len(job.tokens))
    rows = {
        "Rank": str(job.config.rank),
        "Prompts with one concept": f"{1 - errors.one:.1%} kept",
        "Prompts with several": "" if errors.several is None else f"{1 - errors.several:.1%} kept",
        "Other prompts": f"{errors.drift:.2%} changed",
        "Pooled embedding": "" if errors.pooled is None else f"{1 - errors.pooled:.1%} kept",
    }
    if layers := {name for branch in job.adapter.branches[1:] for name in branch.layers}:
        rows["Without gates"] = f"{len(layers)} layers that prompts do not feed, kept as they are"
    exact = max(errors.one, errors.several or 0.0) <= MAX_ERROR
    more = "" if exact else f"<p>{WEAK}</p>"
    text = markup.escape(f"{sentence[0].upper()}{sentence[1:]}.")
    result = f'<div class="verdict{"" if exact else " caution"}">{text}{more}</div>{markup.facts(rows)}'
    sides = "".join(markup.pictures_row(label, [image]) for image, label in job.pictures)
    drawings = f'<div class="result">{sides}</div>{markup.hint(f"{job.prompt}, seed 0")}' if sides else ""
    return result + drawings


def show_program(session: Session, program: str) -> tuple[Any, Any, Any]:
    """Files for a program, where they go, and the prompt or the lines to copy."""
    job = current_distillation(session)
    if job is None or job.adapter is None or program not in FORMS:
        return gr.skip(), gr.skip(), gr.skip()
    report = export_lora(session, job, FORMS[program])
    lora, *embeddings = report.files
    words = dict(zip(job.tokens, [path.stem for path in embeddings], strict=True))
    base = job.adapter.info.base
    steps, label, text = guides(session, job, lora, words, report.notes)[program]
    on = f"For {base.name if base else 'their base'}, on which the concepts were taught."
    if not session.base and program != "diffusers":
        on += " Only diffusers opens pocket: it is a folder, not a checkpoint of one file."
    items = "".join(f"<li>{step}</li>" for step in steps)
    files = gr.File([str(path) for path in report.files], label="Files")
    return files, f"{markup.hint(on)}<ol>{items}</ol>", gr.Textbox(text, label=label)


def guides(
    session: Session, job: DistillationJob, lora: Path, words: dict[str, str], notes: list[str]
) -> dict[str, tuple[list[str], str, str]]:
    """By program: what to do, as HTML; what the text to copy is; the text."""

    def prompt(form: str) -> str:
        text = job.prompt
        for token, word in words.items():
            text = text.replace(token, form.format(word))
        return text

    def code(text: object) -> str:
        return f"<code>{markup.escape(str(text))}</code>"

    rest = ", ".join(code(f"{word}.safetensors") for word in words.values())
    config = fusion.GenerationConfig(prompt=job.prompt)
    config = config.with_base_defaults(fusion.base_defaults(session.pipe, "generation"))
    settings = [f"num_inference_steps={config.num_inference_steps}", f"guidance_scale={config.guidance_scale:g}"]
    settings += [f"guidance_rescale={config.guidance_rescale:g}"] if config.guidance_rescale else []
    calls = [line for note in notes if note.startswith("diffusers: ") for line in note[11:].split("; ")]
    calls = [line.replace(f"{lora.parent}/", "") for line in calls]
    base = str(session.base or commands.near(fusion.pocket()))
    kind, opener = "DiffusionPipeline", "from_pretrained"
    if Path(base).is_file():
        kind, opener = type(session.pipe).__name__, "from_single_file"
    lines = [
        *["import safetensors.torch"] * any("safetensors.torch" in line for line in calls),
        f"from diffusers import {kind}",
        "",
        f"pipe = {kind}.{opener}({base!r})",
        *calls,
        f"settings = dict({', '.join(settings)})",
        f'pipe("{job.prompt}", **settings).images[0].save("picture.png")',
    ]
    return {
        "ComfyUI": (
            [
                f"Move {code(lora.name)} into {code('models/loras')}, and {rest} into {code('models/embeddings')}.",
                "Put a Load LoRA node behind the checkpoint, both strengths at 1.",
                "In prompts, write the embedding's name for each concept:",
            ],
            "Prompt", prompt("embedding:{}"),
        ),
        "A1111, Forge": (
            [
                f"Move {code(lora.name)} into {code('models/Lora')}, and {rest} into {code('embeddings')}.",
                "In prompts, write the embedding's name for each concept, and the LoRA once:",
            ],
            "Prompt", f"{prompt('{}')} <lora:{lora.stem}:1>",
        ),
        "diffusers": (["Run this beside the files, with peft installed:"], "Python", "\n".join(lines)),
    }  # fmt: skip
