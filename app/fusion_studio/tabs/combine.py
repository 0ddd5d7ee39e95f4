"""Combine: concepts and strengths, their compatibility, and the result as one adapter, an export or a model."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import commands, markup
from fusion_studio.errors import bind
from fusion_studio.session import Session, safe_name
from fusion_studio.tabs import LATEST, Picks, at_once, cli_box, command_line, one_lora, picked_of, widget

NOTHING_PICKED = markup.empty("Pick concepts to combine", "Their compatibility is shown here, before any picture.")
METHOD_HINT = "Sums keep every concept at its own tokens. Methods that merge cannot: they act on every word."
SPINNER: dict[str, Any] = {"show_progress": "minimal"}
FORMATS = {"ours": "native", "diffusers": "diffusers", "kohya (A1111, ComfyUI)": "kohya"}
BAKE_HINT = (
    "A copy of the base with the concepts in its own weights, as a diffusers folder that any program draws with. "
    "Baked weights cannot be gated: every concept acts on every word."
)


def build(session: Session) -> SimpleNamespace:
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=300):
            picks = widget("concepts", {}, inserts=False, elem_id="combine-picks")
            choices = [(f"{name}: {row.about}", name) for name, row in at_once().items()]
            options: dict[str, Any] = {"value": "direct_sum", "info": METHOD_HINT, "elem_id": "method"}
            method = gr.Dropdown(choices, label="Fusion method", **options)
            name = gr.Textbox("", label="Name of the result", placeholder="made of the concepts' names", elem_id="name")
            with gr.Row():
                draw = gr.Button("Draw with these", variant="primary", elem_id="combine-draw", min_width=120)
                save = gr.Button("Save as one adapter", elem_id="save", min_width=120)
            lora_form = one_lora.build_form()
            with gr.Accordion("Export for other programs", open=False, elem_id="export-part"):
                form = gr.Radio(list(FORMATS.items()), value="native", label="Format", elem_classes="radio-chips")
                rank = gr.Number(0, label="Compress to rank", precision=0, minimum=0, info="0: exact")
                export = gr.Button("Export", size="sm", elem_id="export")
                files = gr.File(label="Files", file_count="multiple", interactive=False, visible=False, elem_id="files")
            with gr.Accordion("Bake into a model", open=False, elem_id="bake-part"):
                gr.HTML(markup.hint(BAKE_HINT))
                accept = gr.Checkbox(False, label="I accept that", container=False, elem_id="accept")
                bake = gr.Button("Bake", size="sm", elem_id="bake")
        with gr.Column(scale=6, min_width=300):
            verdict = gr.HTML(NOTHING_PICKED, elem_id="combined")
            lora = one_lora.build_views()
            notes, cli = gr.HTML(elem_id="combine-notes"), cli_box("combine")
    gr.on([picks.input, method.input], bind(verdict_html, session), [picks, method], verdict, **LATEST)
    inputs = [picks, method, name]
    saved = save.click(bind(save_as_one, session), inputs, [notes, cli], api_name="fuse", **SPINNER)
    export.click(bind(export_picked, session), [*inputs, form, rank], [files, notes, cli], api_name="export", **SPINNER)
    bake.click(bind(bake_picked, session), [*inputs, accept], [notes, cli], api_name="bake", **SPINNER)
    distilled = one_lora.connect(session, picks, name, lora_form, lora, cli)
    return SimpleNamespace(
        picks=picks, method=method, draw=draw, verdict=verdict, saved=[saved, *distilled.finished],
        watching=distilled.watching,
    )  # fmt: skip


def verdict_html(session: Session, picks: Picks, method: str) -> str:
    """The verdict in one sentence, and the heat map of interference under it."""
    picked = picked_of(picks)
    if not picked:
        return NOTHING_PICKED
    report = fusion.compatibility(session.adapters(list(picked)), session.pipe)
    heat_map = markup.heat_map(report) if len(report.names) > 1 else ""
    about = f"{method}: {fusion.METHODS[method].about}. {METHOD_HINT}"
    return markup.verdict(report) + (markup.hint(about) if method != "direct_sum" else "") + heat_map


def save_as_one(session: Session, picks: Picks, method: str = "direct_sum", name: str = "") -> tuple[str, Any]:
    """The picked concepts as one adapter in the library, to be drawn with, exported and combined like any other."""
    picked = picked_of(picks)
    target = fusion.Library(session.library).save(session.fused(picked, method), _file_name(picked, name))
    fusion.join_adapter_pictures([session.library / f"{key}.safetensors" for key in picked], target)
    message = markup.hint(f"'{target.stem}' is in the library now.")
    return message, command_line(_fuse_line(session, picked, method, commands.file_of(session, target.stem)))


def export_picked(
    session: Session, picks: Picks, method: str = "direct_sum", name: str = "", form: str = "native",
    rank: float | None = None,
) -> tuple[Any, str, Any]:  # fmt: skip
    """The picked concepts as files for this or other programs."""
    picked, title = picked_of(picks), _file_name(picked_of(picks), name)
    files, notes, line = export_adapter(session, session.fused(picked, method, title), title, form, rank)
    first = _fuse_line(session, picked, method, f"{title}.safetensors")
    return files, notes, command_line(f"{first} && {line}" if form != "native" else first)


def export_adapter(
    session: Session, adapter: fusion.Adapter, title: str, form: str, rank: float | None = None
) -> tuple[Any, str, str]:
    """Files of an adapter for download, notes on them, and the command line."""
    folder = session.folder / "exports"
    target, source = folder / f"{title}.safetensors", f"{title}.safetensors"
    if form == "native":
        folder.mkdir(exist_ok=True)
        fusion.save(adapter, target)
        return gr.File([str(target)], visible=True), "", commands.command("library", session.library, "--add", source)
    target = folder / f"{title}_{form}.safetensors"
    report = fusion.export(adapter, target, form, rank=int(rank) if rank else None)
    notes = "".join(f"<li>{markup.escape(note.replace(f'{folder}/', ''))}</li>" for note in report.notes)
    further = ["--rank", int(rank)] if rank else []
    line = commands.command("export", source, "--to", form, "-o", target.name, *further)
    return gr.File([str(path) for path in report.files], visible=True), f'<ul class="notes">{notes}</ul>', line


def bake_picked(
    session: Session, picks: Picks, method: str = "direct_sum", name: str = "", accept: bool = False
) -> tuple[str, Any]:
    """A base of its own with the concepts in its weights, as a folder beside the library's files."""
    if not accept:
        raise fusion.FusionError("Baked weights act on every word; accept that first.")
    picked = picked_of(picks)
    folder = session.library / "models" / _file_name(picked, name)
    if folder.exists():
        raise fusion.FusionError(f"'{folder}' is there already; give the result another name.")
    fused = session.fused(picked, method, folder.name)
    # Libraries open models without memory for the parameters of all threads; so nobody else uses models meanwhile.
    with session.queue.acquire("A copy of the base is being opened"):
        copy = fusion.open_pipeline(session.base, device=session.device, dtype="stored", **session.options)
    fusion.bake(copy, fused, "none")
    fusion.save_model(copy, folder)
    message = f"'{folder}' is a base of its own now: choose it above, or open it anywhere diffusers folders are read."
    fused_file = f"{folder.name}.safetensors"
    line = commands.command("bake", fused_file, "-o", folder, "--gating", "none", *session.base_flags)
    return markup.hint(message), command_line(f"{_fuse_line(session, picked, method, fused_file)} && {line}")


def _file_name(picked: Mapping[str, float], name: str) -> str:
    return safe_name(name or "+".join(picked))


def _fuse_line(session: Session, picked: Mapping[str, float], method: str, target: Path | str) -> str:
    options = ["--method", method] if method != "direct_sum" else []
    options += session.base_flags if fusion.METHODS[method].needs_base else []
    return commands.command("fuse", *commands.used(session, picked), *options, "-o", target)
