"""Write an adapter as a LoRA that kohya's tools, A1111, ComfyUI, InvokeAI or diffusers read."""

import argparse
from pathlib import Path

from fusion.cli.console import DTYPES, example, notes, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fusion export ADAPTER --to diffusers|kohya -o FILE [options]"
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file, single or fused")
    add(
        "--to",
        required=True,
        metavar="FORM",
        choices=("diffusers", "kohya"),
        help="diffusers/PEFT, or kohya (A1111, ComfyUI)",
    )
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the LoRA, .safetensors")
    add("--rank", type=int, metavar="N", help="compress to this rank (default: exact)")
    add("--energy", type=float, metavar="X", help="compress, keeping this share of each layer's energy, as 0.99")
    add("--dtype", default="float16", metavar="TYPE", choices=DTYPES, help="of the file (default: float16)")


def run(args: argparse.Namespace) -> None:
    from fusion.formats.exporting import export
    from fusion.formats.reading import load

    adapter = load(args.adapter)
    report = export(adapter, args.output, args.to, rank=args.rank, energy=args.energy, dtype=args.dtype)
    for path in report.files:
        print(f"wrote {path} ({size(Path(path))})")
    notes(report.notes)
    if adapter.gated:
        print(f"next: {example('evaluate', args.adapter)}  # what the missing gates cost")
