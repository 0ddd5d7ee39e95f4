"""Write an adapter as a LoRA that kohya's tools, A1111, ComfyUI, InvokeAI or diffusers read."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusion.cli.console import add_file_arguments, example, file_size, print_list


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion export ADAPTER --to diffusers|kohya -o FILE [options]"
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file, single or fused")
    forms = ("diffusers", "kohya")
    add("--to", required=True, metavar="FORM", choices=forms, help="diffusers/PEFT, or kohya (A1111, ComfyUI)")
    add_file_arguments(parser, "the LoRA")


def run(args: Namespace) -> None:
    from fusion.formats.adapter_file import load
    from fusion.formats.lora_export import export

    adapter = load(args.adapter)
    report = export(
        adapter, args.output, args.to, rank=args.rank, energy=args.energy, dtype=args.dtype,
        overwrite=args.overwrite,
    )  # fmt: skip
    for path in report.files:
        print(f"wrote {path} ({file_size(Path(path))})")
    print_list(report.notes)
    if adapter.gated:
        print(f"next: {example('evaluate', args.adapter)}  # measures what the missing gates cost")
