"""Write an adapter as a LoRA that kohya's tools, A1111, ComfyUI, InvokeAI or diffusers read.

A plain LoRA cannot be gated. With --distill a LoRA learns what the gated adapter does, and leaves prompts without its
words alone as the gates do: that takes minutes, and the base. Such files can be used together.
"""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion.cli.console import add_base, add_file_arguments, example, file_size, on_base, open_base, print_list
from fusion.cli.distillation import (
    add_distillation_settings,
    distill_adapters,
    finished_later,
    refuse_distillation_settings,
)  # fmt: skip
from fusion.output_files import carries_mark


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion export ADAPTER --to diffusers|kohya -o FILE [options]"
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file, single or fused")
    forms = ("diffusers", "kohya")
    add("--to", required=True, metavar="FORM", choices=forms, help="diffusers/PEFT, or kohya (A1111, ComfyUI)")
    add_file_arguments(parser, "the LoRA")
    add("--distill", action="store_true", help="learn a LoRA of --rank that leaves other words alone")
    add_base(parser.add_argument_group("base"), "for --distill and DoRAs: ")
    add_distillation_settings(parser)


def run(args: Namespace) -> None:
    from fusion.formats.adapter_file import load
    from fusion.formats.lora_export import check_export_outputs, export

    (adapter,), compression = on_base([load(args.adapter)], args), {"rank": args.rank, "energy": args.energy}
    if args.distill:
        check_export_outputs(named(adapter, args.output.stem), args.output, overwrite=args.overwrite)
        adapter, compression = distill_adapters(lambda: open_base(args.base, args, None), [adapter], args), {}
    else:
        refuse_distillation_settings(args, "--distill")
    with finished_later(args) if args.distill else nullcontext():
        options = {"dtype": args.dtype, "overwrite": args.overwrite, "picture": picture_beside(args.adapter)}
        report = export(adapter, args.output, args.to, **compression, **options)
    for path in report.files:
        print(f"wrote {path} ({file_size(Path(path))})")
    print_list(report.notes)
    if adapter.gated:
        print(f"next: {example('evaluate', args.adapter)}  # measures what the missing gates cost")


def picture_beside(file: Path) -> Any:
    """The adapter's own picture, where this program has drawn it."""
    from fusion.formats.picture_file import as_picture, decode

    path = file.with_suffix(".png")
    return as_picture(decode(path, f"'{path}'", min_side=1)) if path.is_file() and carries_mark(path) else None


def named(adapter: Any, name: str) -> Any:
    """The adapter with the name that a distilled one will have, by which earlier exports are recognised."""
    return replace(adapter, info=replace(adapter.info, name=name))
