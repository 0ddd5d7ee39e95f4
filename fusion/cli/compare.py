"""One prompt and seed over strengths, fusion methods and adapters: a sheet of pictures with measured numbers.

Kept is the share of a concept's effect that remains, 100% as its file alone draws it; leakage is how much prompts
without any concept change, 0 not at all.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from fusion.cli.console import STRENGTH, add_base_arguments, add_overwrite, number, open_base
from fusion.cli.progress_bar import progress
from fusion.config import MAX_SEED
from fusion.output_files import check_output


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = 'fusion compare ADAPTER ... --prompt "..." -o SHEET.png [options]'
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files")
    add("--prompt", required=True, metavar="TEXT", help="of every picture")
    add("--strengths", nargs="+", type=STRENGTH, default=[0.5, 1.0], metavar="X", help="rows (default: 0.5 1)")
    add("--methods", nargs="+", default=["direct_sum"], metavar="NAME", help="columns (default: direct_sum)")
    add("--alone", action="store_true", help="also a column for each adapter alone")
    add("--own_strengths", nargs="+", type=STRENGTH, metavar="X", help="one for each adapter, times the row's")
    add("--seed", type=number(int, 0, MAX_SEED), default=0, metavar="N", help="of every picture (default: 0)")
    add("--num_inference_steps", "--steps", type=number(int, 1, 1000), metavar="N", help="denoising steps")
    text = "layers left out at the end of the text encoder, as in generate (default: the base's own)"
    add("--clip_skip", type=number(int, 0, 32), metavar="N", help=text)
    add("-o", "--output", type=Path, required=True, metavar="PNG", help="the sheet")
    add_overwrite(parser)
    add_base_arguments(parser, draws=True)


def run(args: Namespace) -> None:
    from fusion.evaluation.comparison import Cell, compare
    from fusion.evaluation.sheets import contact_sheet
    from fusion.formats.adapter_file import load
    from fusion.formats.png_file import write_png

    check_output(args.output, endings=(".png",), overwrite=args.overwrite)
    adapters = [load(path) for path in args.adapters]
    pipe = open_base(args.base, args, args.dtype)
    names = ("own_strengths", "strengths", "methods", "alone", "seed", "num_inference_steps", "clip_skip")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    rows: dict[float, list[Cell]] = {}
    with progress() as advance:
        for cell in compare(pipe, adapters, args.prompt, **settings):
            advance(cell.number, cell.total)
            rows.setdefault(cell.strength, []).append(cell)
    for row in rows.values():
        for cell in row:
            print(cell.to_text().replace("\n", "  "))
    sheet = contact_sheet([[(cell.picture.image, cell.to_text()) for cell in row] for row in rows.values()])
    print(f"wrote {write_png(args.output, sheet)}")
