"""Compare: one prompt and seed over strengths, methods and adapters, with measured numbers under every picture."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import gradio as gr

import fusion
from fusion_studio import commands, markup
from fusion_studio.errors import bind
from fusion_studio.session import Session, tokens_of
from fusion_studio.streaming import ProgressStream, Result, StepProgress, stream_results
from fusion_studio.tabs import LATEST, PRIVATE, STREAM, Picks, at_once, cli_box, command_line, picked_of, widget
from fusion_studio.tabs.draw import STOPPED, button_states

NO_GRID = markup.empty("A grid of pictures", "One prompt and seed; rows are strengths, columns methods and adapters.")
LEGEND = (
    "Kept: how much of a concept remains, 100% as its file alone draws it. "
    "Leakage: how much prompts without any concept change, 0 not at all."
)


def build(session: Session) -> SimpleNamespace:
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=4, min_width=300):
            picks = widget("concepts", {}, inserts=False, elem_id="compare-picks")
            prompt = gr.Textbox("", label="Prompt", lines=2, elem_id="compare-prompt")
            strengths = gr.Textbox("0.5 1", label="Strengths", info="Rows of the grid", elem_id="strengths")
            methods = gr.CheckboxGroup([*at_once()], value=["direct_sum"], label="Methods", elem_classes="radio-chips")
            alone = gr.Checkbox(True, label="Also each concept alone", container=False)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Row():
                start = gr.Button("Compare", variant="primary", elem_id="compare", scale=3)
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-comparing", min_width=90)
        with gr.Column(scale=7, min_width=300):
            grid = gr.HTML(NO_GRID, elem_id="grid")
            progress = gr.HTML(elem_id="compare-progress")
            sheet = gr.DownloadButton("Download the sheet", visible=False, size="sm", elem_id="sheet")
            cli = cli_box("compare")
    picks.input(bind(suggest_prompt, session), [picks, prompt], prompt, **LATEST)
    inputs, outputs = [picks, prompt, strengths, methods, alone, seed], [grid, progress, sheet, cli]
    started = start.click(lambda: button_states(True), None, [start, stop], **PRIVATE)
    comparing = started.then(bind(draw_grid, session), inputs, outputs, api_name="compare", **STREAM)
    comparing.then(lambda: button_states(False), None, [start, stop], **PRIVATE)
    comparing.failure(lambda: (*button_states(False), ""), None, [start, stop, progress], **PRIVATE)
    stop.click(lambda: (*button_states(False), STOPPED), None, [start, stop, progress], cancels=[comparing], **PRIVATE)
    return SimpleNamespace(picks=picks, prompt=prompt, methods=methods)


def suggest_prompt(session: Session, picks: Picks, prompt: str) -> Any:
    """An example for the picked concepts, as long as nobody has written a prompt of their own."""
    known = [tokens_of(entry.info) for entry in session.entries().values()]
    suggested = prompt.endswith(" background") and any(token in prompt for tokens in known for token in tokens)
    if prompt.strip() and not suggested:
        return gr.skip()
    adapters = session.adapters(list(picked_of(picks)))
    return session.example_prompt([token for adapter in adapters for token in tokens_of(adapter.info)])


def draw_grid(
    session: Session, picks: Picks, prompt: str, strengths: str = "0.5 1", methods: Sequence[str] = ("direct_sum",),
    alone: bool = True, seed: float = 0,
) -> Iterator[tuple[Any, ...]]:  # fmt: skip
    """Draw the grid, picture by picture; at the end the sheet to keep."""
    picked = picked_of(picks)
    if not picked or not prompt.strip():
        raise fusion.FusionError("Pick concepts and write a prompt first.")
    try:
        rows = [float(word) for word in strengths.replace(",", " ").split()]
    except ValueError:
        raise fusion.FusionError(f"'{strengths}' are no strengths; write numbers, like 0.5 1.") from None
    adapters, cells = session.adapters(list(picked)), list[fusion.Cell]()

    def work(stream: ProgressStream) -> str:
        grid = fusion.compare(
            session.pipe, adapters, prompt, own_strengths=list(picked.values()), strengths=rows, methods=list(methods),
            alone=(alone and len(picked) > 1) or not methods, seed=int(seed), on_step=stream.on_step,
        )  # fmt: skip
        for cell in grid:
            cells.append(cell)
            stream.send(cell)
        path = session.folder / f"comparison-{secrets.token_hex(4)}.png"
        sheet = fusion.contact_sheet([[(c.picture.image, c.to_text()) for c in row] for row in by_row(cells)])
        fusion.write_png(path, sheet)
        return str(path)

    files = [commands.file_of(session, key) for key in picked]
    own_strengths = ["--own_strengths", *picked.values()] if any(value != 1 for value in picked.values()) else []
    line = commands.command(
        "compare", *files, "--prompt", prompt, "--strengths", *rows, "--methods", *methods,
        *(["--alone"] if alone else []), *own_strengths, "--seed", int(seed),
        "-o", "sheet.png", *session.base_flags,
    )  # fmt: skip
    yield NO_GRID, markup.bar(0, 1, "Measuring …"), gr.DownloadButton(visible=False), command_line(line)
    for update in stream_results(session, "A comparison is being drawn", work):
        if isinstance(update, Result):
            yield grid_html(cells), markup.hint(LEGEND), gr.DownloadButton(value=update.value, visible=True), gr.skip()
        elif isinstance(update, fusion.Cell):
            yield grid_html(cells), markup.bar(update.number, update.total), gr.skip(), gr.skip()
        elif not isinstance(update, StepProgress):
            yield gr.skip(), markup.hint(update), gr.skip(), gr.skip()


def by_row(cells: Sequence[Any]) -> list[list[Any]]:
    return [list(row) for _, row in groupby(cells, lambda cell: cell.strength)]


def grid_html(cells: Sequence[Any]) -> str:
    """The pictures so far as a table."""
    rows = by_row(cells)
    head = "".join(f"<th scope=col>{markup.escape(cell.column)}</th>" for cell in rows[0]) if rows else ""
    body = "".join(
        f"<tr><th scope=row>{row[0].strength:g}</th>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows
    )
    return f'<div class="grid"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Any) -> str:
    numbers = "".join(f"<li>{markup.escape(t)} kept <b>{share:.0%}</b></li>" for t, share in cell.retention.items())
    image = f'<img alt="{markup.escape(cell.to_text())}" src="{markup.data_url(cell.picture.image, 384)}">'
    return f"<td>{image}<ul>{numbers}<li>leakage <b>{cell.leakage:.3f}</b></li></ul></td>"
