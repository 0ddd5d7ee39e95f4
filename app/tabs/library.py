"""Library: a card for every adapter in the folder."""

import base64
import html
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from app.session import Session
from app.tabs.draw import tokens_of

THUMBNAIL = 192  # pixels
EMPTY = '<div class="nothing"><h3>The library is empty</h3><p>What you teach lands here, as plain files.</p></div>'


def build(session: Session) -> tuple[gr.HTML, gr.Button]:
    with gr.Row(elem_classes="library-head"):
        gr.HTML(f'<p class="hint">Files in <code>{html.escape(str(session.library.resolve()))}</code></p>')
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=110, elem_id="refresh", elem_classes="quiet")
    cards = gr.HTML(elem_id="cards")
    return cards, refresh


def cards_html(session: Session) -> str:
    """Every adapter of the library as a card."""
    cards = "".join(card(entry) for entry in session.entries().values())
    return f'<div class="cards">{cards}</div>' if cards else EMPTY


def card(entry: Any) -> str:
    info, tokens = entry.info, tokens_of(entry.info)
    nouns = ", ".join(concept.noun for concept in info.concepts if concept.noun)
    facts = {
        "Base": f"{info.base.name} ({info.base.family})" if info.base else "unknown",
        "Slice": ", ".join(str(part) for part in entry.slices) or "none",
        "Type": ", ".join(dict.fromkeys(branch.type for branch in entry.branches)),
        "Size": f"{entry.size / 1e6:.1f} MB" if entry.size >= 1e6 else f"{entry.size / 1e3:.0f} kB",
        "Steps": str(info.provenance.steps or "fused"),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    title = f"<h3>{html.escape(' '.join(tokens) or info.name)}</h3><p>{html.escape(nouns or info.name)}</p>"
    return f'<article class="card">{picture(entry.path, tokens)}<div>{title}<dl>{rows}</dl></div></article>'


def picture(adapter: Path, tokens: list[str]) -> str:
    """The picture beside an adapter's file, small and inside the page, so that no folder is opened to visitors."""
    for path in (adapter.with_suffix(ending) for ending in (".png", ".jpg", ".webp")):
        try:
            with Image.open(path) as image:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                data = BytesIO()
                image.convert("RGB").save(data, "PNG")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
    initial = (tokens[0].strip("<>") if tokens else adapter.stem)[:1]
    return f'<span class="initial" aria-hidden="true">{html.escape(initial)}</span>'
