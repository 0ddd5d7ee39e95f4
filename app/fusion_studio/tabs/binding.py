"""Bind a LoRA to a word: it becomes a concept of the library, which acts where the prompt has the word."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import commands, markup
from fusion_studio.errors import bind
from fusion_studio.session import Session, safe_name, tokens_of
from fusion_studio.tabs import PRIVATE, Picks, cli_box, command_line, picked_of

HINT = (
    "A LoRA of another program acts on the whole prompt. Bound to a token such as &lt;alice&gt;, or to words of your "
    "prompts such as <i>the knight</i>, it acts there only, and pictures without the word stay the base's."
)


def build(session: Session) -> SimpleNamespace:
    with gr.Accordion("Bind a LoRA to a word", open=False, elem_id="bind-part") as part:
        gr.HTML(markup.hint(HINT))
        with gr.Row():
            lora = gr.Dropdown([], label="LoRA of the library", elem_id="bind-lora", min_width=120)
            upload = gr.UploadButton("Import", file_types=[".safetensors"], size="sm", scale=0, elem_id="bind-import")
        with gr.Row():
            word = gr.Textbox(label="Word or words", placeholder="<alice>, or the knight", elem_id="bind-word")
            button = gr.Button("Bind", size="sm", scale=0, min_width=90, elem_id="bind")
        notes, cli = gr.HTML(), cli_box("bind")
    part.expand(bind(lora_choices, session), lora, lora, **PRIVATE)
    upload.upload(bind(import_lora, session), upload, lora, show_progress="hidden", api_visibility="private")
    return SimpleNamespace(button=button, inputs=[lora, word], views=[notes, cli])


def lora_choices(session: Session, chosen: str | None = None) -> Any:
    """The files of the library that can be bound: those that no token gates."""
    keys = [
        key
        for key, entry in session.entries().items()
        if len(entry.info.concepts) < 2 and not any(branch.gate for branch in entry.branches)
    ]
    return gr.Dropdown(keys, value=chosen if chosen in keys else next(iter(keys), None))


def import_lora(session: Session, file: str) -> Any:
    """Copy an uploaded LoRA into the library, and choose it."""
    return lora_choices(session, import_adapter(session, file).stem)


def import_adapter(session: Session, file: str) -> Path:
    """A copy of an uploaded adapter file in the library, once it has been checked."""
    upload = session.store_upload(file)
    try:
        return fusion.Library(session.library).add(upload, safe_name(Path(file).stem))
    except fusion.FusionError as error:
        raise fusion.FusionError(str(error).replace(str(upload), Path(file).name)) from None
    finally:
        upload.unlink(missing_ok=True)


def bind_lora(session: Session, lora: str | None, word: str, picks: Picks) -> tuple[Any, ...]:
    """Save a LoRA of the library, bound to a word, as a concept of the library; it is picked instead of the LoRA."""
    if not lora:
        raise fusion.FusionError("Choose a LoRA of the library first, or import one.")
    (adapter,) = session.adapters([lora])
    bound = fusion.bind(session.pipe, adapter, word.strip())
    (token,) = tokens_of(bound.info)
    if any(token in tokens_of(entry.info) for entry in session.entries().values()):
        raise fusion.FusionError(f"The library already has {token}; choose another word.")
    path = fusion.Library(session.library).save(bound, safe_name(token), "float32")
    picked = {key: strength for key, strength in picked_of(picks).items() if key != lora}
    line = commands.command(
        "fuse", "--bind", f"{' '.join(word.split())}={commands.file_of(session, lora)}", "--dtype", "float32", "-o",
        commands.near(path), *session.base_flags,
    )  # fmt: skip
    hint = markup.hint(f"It acts where the prompt has “{fusion.bound_words(bound)[token]}”, and is picked.")
    return {"picked": {**picked, path.stem: 1.0}}, hint, command_line(line)
