"""Library: a card for each adapter, to open, rename, export and delete; import of other files; the slice map."""

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import commands, markup
from fusion_studio.errors import bind
from fusion_studio.session import Session, safe_name, tokens_of
from fusion_studio.tabs import PRIVATE, cli_box, command_line, widget
from fusion_studio.tabs.binding import import_adapter
from fusion_studio.tabs.combine import FORMATS, export_adapter

NO_ADAPTERS = markup.empty("The library is empty", "What you teach is saved here, as files. Others can be imported.")
MAX_CARDS = 200  # shown at once
CHOOSE_HINT = markup.hint("Choose a card to rename, export or delete it.")


def build(session: Session) -> SimpleNamespace:
    with gr.Row(elem_classes="library-head"):
        search = gr.Textbox(
            label="Search", show_label=False, placeholder="Search the library", container=False, scale=3
        )
        upload = gr.UploadButton("Import a file", file_types=[".safetensors"], size="sm", elem_id="import", scale=0)
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=110, elem_id="refresh", elem_classes="quiet")
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=7, min_width=300):
            cards = widget("cards", "", elem_id="cards")
            slices = gr.HTML(elem_id="slices")
        with gr.Column(scale=4, min_width=300):
            chosen = gr.Textbox("", visible=False)
            about = gr.HTML(CHOOSE_HINT, elem_id="about")
            notes, cli = gr.HTML(elem_id="library-notes"), cli_box("library")
            with gr.Column(visible=False, elem_id="one") as actions:
                draw = gr.Button("Draw with it", variant="primary", elem_id="card-draw")
                with gr.Row():
                    token = gr.Textbox(label="Its token in prompts", elem_id="new-token", min_width=120)
                    rename = gr.Button("Rename", size="sm", elem_id="rename", scale=0, min_width=90)
                with gr.Row():
                    form = gr.Dropdown(list(FORMATS.items()), value="native", label="Format", min_width=120)
                    export = gr.Button("Export", size="sm", elem_id="card-export", scale=0, min_width=90)
                files = gr.File(file_count="multiple", interactive=False, visible=False, elem_id="card-files", label="")
                delete = gr.Button("Delete …", size="sm", elem_id="delete", elem_classes="quiet")
                with gr.Row(visible=False, elem_id="sure") as sure:
                    yes = gr.Button("Yes, delete it for good", variant="stop", size="sm", elem_id="yes-delete")
                    no = gr.Button("Keep it", size="sm", elem_id="keep")
    details = [about, actions, token, sure, files]
    refreshed = bind(show_library, session)
    refresh.click(refreshed, [search, chosen], [cards, slices], api_name="library", show_progress="hidden")
    search.input(bind(cards_html, session), [search, chosen], cards, **PRIVATE)
    opened = cards.select(bind(open_card, session), None, [chosen, *details], **PRIVATE)
    opened.then(bind(cards_html, session), [search, chosen], cards, **PRIVATE)
    delete.click(lambda: gr.Row(visible=True), None, sure, **PRIVATE)
    no.click(lambda: gr.Row(visible=False), None, sure, **PRIVATE)
    changes = [chosen, *details, notes, cli]
    options: dict[str, Any] = {"show_progress": "hidden"}
    changed = [
        yes.click(bind(delete_adapter, session), chosen, changes, api_name="delete", **options),
        rename.click(bind(rename_adapter, session), [chosen, token], changes, api_name="rename", **options),
        upload.upload(bind(import_file, session), upload, changes, api_name="import", **options),
    ]
    for event in changed:
        event.then(refreshed, [search, chosen], [cards, slices], **PRIVATE)
    export.click(bind(export_card, session), [chosen, form], [files, notes, cli], api_visibility="private")
    views = {"cards": cards, "slices": slices, "search": search, "chosen": chosen, "draw": draw}
    return SimpleNamespace(changed=changed, refreshed=refreshed, **views)


def show_library(session: Session, search: str = "", chosen: str = "") -> tuple[str, str]:
    """The cards, and the slice map of the present base."""
    return cards_html(session, search, chosen), slices_html(session)


def cards_html(session: Session, search: str = "", chosen: str = "") -> str:
    """Every adapter of the library whose texts have all the words of the search."""
    entries, words = session.entries(), search.lower().split()
    matches = [entry for entry in entries.values() if all(word in _texts(entry) for word in words)]
    unreadable = sorted({path.stem for path in session.library.glob("[!.]*.safetensors")} - entries.keys())
    names = ", ".join(markup.shortened(unreadable))
    warning = f"Not shown, because they cannot be read (the terminal says why): {names}."
    hint = markup.hint(warning if unreadable else "")
    if not matches:
        return (markup.empty("Nothing found", f"No card has “{search}”.") if entries else NO_ADAPTERS) + hint
    cards = "".join(markup.card(entry, chosen=entry.path.stem == chosen) for entry in matches[:MAX_CARDS])
    rest = f"{len(matches) - MAX_CARDS} older ones are not shown; search for them."
    return f'<div class="cards">{cards}</div>{markup.hint(rest) if len(matches) > MAX_CARDS else ""}{hint}'


def slices_html(session: Session) -> str:
    """Nothing while the library is empty, or the base not yet open: cards need no model."""
    if not session.entries() or not session.is_open:
        return ""
    return markup.slice_map(fusion.slice_map(session.pipe, fusion.Library(session.library)))


def open_card(session: Session, event: gr.EventData) -> tuple[Any, ...]:
    """The card that was clicked."""
    return detail(session, str(event.key))


def detail(session: Session, key: str) -> tuple[Any, ...]:
    """Everything about one adapter, and what can be done with it."""
    entry = session.entries().get(key)
    if entry is None:
        return "", CHOOSE_HINT, gr.Column(visible=False), "", gr.Row(visible=False), gr.File(visible=False)
    info, origin = entry.info, entry.info.provenance
    how = f"{origin.steps} steps, seed {origin.seed}" if origin.steps else origin.tool or "imported"
    errors = fusion.HeldOutErrors.from_json(origin.settings.get("errors"))  # of a distilled LoRA
    listed = lambda texts: ", ".join(markup.shortened([*texts]))  # noqa: E731
    rows = {
        "Base": listed([f"{info.base.name} ({info.base.family})" if info.base else "not known"]),
        "Slice": listed(map(str, entry.slices)) or "none",
        "Type": listed(dict.fromkeys(branch.type for branch in entry.branches)),
        "Acts": "at its own tokens" if all(branch.gate for branch in entry.branches) else "on every word",
        "How": listed([how]),
        "Distilled": errors.sentence(len(info.concepts)) if errors else "",
        "Made of": listed(origin.parents),
        "Size": markup.size_of(entry.size),
        "Date": f"{datetime.fromtimestamp(entry.path.stat().st_mtime):%d %B %Y, %H:%M}",
        "File": entry.path.name,
    }
    tokens = tokens_of(info)
    title = f"<h3>{markup.escape(' '.join(markup.shortened(tokens)) or key)}</h3>"
    box = gr.Textbox(" ".join(tokens) or key, interactive=True)
    return key, title + markup.facts(rows), gr.Column(visible=True), box, gr.Row(visible=False), gr.File(visible=False)


def rename_adapter(session: Session, key: str, words: str) -> tuple[Any, ...]:
    """New tokens for an adapter's concepts, in their order; a single one names the file too."""
    library, entry = fusion.Library(session.library), session.entries().get(key)
    if entry is None:
        raise fusion.FusionError(f"'{key}' is no longer in the library; choose another card.")
    old, new = tokens_of(entry.info), [f"<{word.strip('<>').lower()}>" for word in words.split()]
    if old and len(old) != len(new):
        raise fusion.FusionError(f"It has {len(old)} tokens ({' '.join(old)}); write as many, with spaces between.")
    tokens = {a: b for a, b in zip(old, new, strict=True) if a != b} if old else {}
    others = {t for other, e in session.entries().items() if other != key for t in tokens_of(e.info)}
    if clash := sorted(others & {*tokens.values()}):
        raise fusion.FusionError(f"The library already has {clash[0]}; choose another token.")
    name = safe_name(words) if len(new) == 1 else key
    target = library.rename(key, name, tokens)
    pairs = ["--tokens", *(f"{a}={b}" for a, b in tokens.items())] if tokens else []
    line = commands.command("library", session.library, "--rename", key, target.stem, *pairs)
    return *detail(session, target.stem), markup.hint(f"Renamed to {target.stem}."), command_line(line)


def delete_adapter(session: Session, key: str) -> tuple[Any, ...]:
    """Delete an adapter and the picture beside it for good."""
    fusion.Library(session.library).remove(key)
    line = commands.command("library", session.library, "--delete", key)
    return *detail(session, ""), markup.hint(f"'{key}' is deleted; its slice is free again."), command_line(line)


def import_file(session: Session, file: str) -> tuple[Any, ...]:
    """Copy an uploaded adapter file into the library, once it has been checked."""
    added = import_adapter(session, file)
    line = commands.command("library", session.library, "--add", f"{safe_name(Path(file).stem)}.safetensors")
    return *detail(session, added.stem), markup.hint(f"'{added.stem}' is in the library now."), command_line(line)


def export_card(session: Session, key: str, form: str) -> tuple[Any, str, Any]:
    """One adapter as files for this or other programs."""
    (adapter,) = session.adapters([key])
    files, notes, line = export_adapter(session, adapter, safe_name(key), form)
    return files, notes, command_line(line)


def _texts(entry: Any) -> str:
    info = entry.info
    nouns = [concept.noun for concept in info.concepts]
    base = [info.base.name, info.base.family] if info.base else []
    kinds = [branch.type for branch in entry.branches]
    return " ".join([entry.path.stem, *tokens_of(info), *nouns, *base, *kinds]).lower()
