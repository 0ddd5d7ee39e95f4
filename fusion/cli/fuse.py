"""Fuse several adapters into one, and report whether they are compatible; with --bind also a single LoRA, for a word.

direct_sum, average and energy_balanced keep every adapter with its gate. The other methods, --rank and --energy merge
all of them into one LoRA, which acts on every token. distill learns one LoRA that leaves other words alone as the gates
do, for other programs; it takes minutes, and `--rank` is the rank that it learns.
"""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from fusion.cli.console import (
    UsageError,
    add_base,
    add_file_arguments,
    add_strengths,
    base_flags,
    example,
    file_size,
    on_base,
    open_base,
    print_compatibility,
)
from fusion.cli.distillation import (
    add_distillation_settings,
    distill_adapters,
    finished_later,
    refuse_distillation_settings,
)  # fmt: skip
from fusion.cli.generate import add_bind, bindings
from fusion.errors import closest
from fusion.methods import METHODS, MethodOptions
from fusion.methods.method import AdapterMerge


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion fuse [ADAPTER ...] -o FILE [options]"
    parser.epilog = "example: fusion fuse dog.safetensors cat.safetensors -o pets.safetensors --strength 1 0.8"
    add = parser.add_argument
    add("adapters", nargs="*", type=Path, metavar="ADAPTER", help="adapter files")
    add_bind(parser)
    add_file_arguments(parser, "the fused adapter")
    add_strengths(parser)
    add("--gating", choices=("tokens", "none"), help="how the adapters are gated (default: as their files say)")
    add("--method", default="direct_sum", metavar="NAME", help="one of those below (default: direct_sum)")
    text = "rename a token of the last adapter that has it"
    add("--rename", action="append", default=[], metavar="<OLD>=<NEW>", help=text)
    add("--allow_overlap", action="store_true", help="let ungated adapters share directions under direct_sum")
    parser.epilog = f"methods:\n{methods()}\n\n{parser.epilog}"
    add = parser.add_argument_group("options of methods").add_argument
    for option in fields(MethodOptions):
        kind: Any = type(option.default)
        text = f"{option.metadata['help']} (default: {option.default:g})"
        add(f"--{option.name}", type=kind, default=option.default, metavar="N" if kind is int else "X", help=text)
    add_base(parser.add_argument_group("base"), "where a method or --bind needs it: ")
    add_distillation_settings(parser, leave=["seed"])


def methods() -> str:
    """The table of methods as text."""
    width = max(map(len, METHODS))
    needs = {name: "; runs the base" if row.needs_base else "" for name, row in METHODS.items()}
    return "\n".join(f"  {name:<{width}}  {row.about}{needs[name]}" for name, row in METHODS.items())


def run(args: Namespace) -> None:
    from fusion.composition.compatibility_report import compatibility
    from fusion.composition.fusing import fuse
    from fusion.formats.adapter_file import check_adapter_output, load
    from fusion.generation.adapter_pictures import join_adapter_pictures
    from fusion.library.library_folder import Library
    from fusion.models.binding import bind

    pairs = bindings(args.bind)
    files = [*args.adapters, *(path for _, path in pairs)]
    if not files:
        raise UsageError("There is nothing to fuse; name an adapter, or bind one to a word with --bind.")
    adapters = [load(path) for path in args.adapters]
    if pairs:
        pipe = open_base(args.base, args, None)
        adapters += [bind(pipe, load(path), word) for word, path in pairs]
    adapters = on_base(renamed(adapters, args.rename), args)
    tokens = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    target = check_adapter_output(args.output, tokens, overwrite=args.overwrite)
    if not args.overwrite and any(target.exists() and target.samefile(path) for path in files):
        raise UsageError(f"'{target}' is one of the adapters to fuse; choose another name, or add --overwrite.")
    if args.method not in METHODS:
        raise UsageError(f"--method '{args.method}' is no method{closest(args.method, METHODS)}")
    options = MethodOptions(**{option.name: getattr(args, option.name) for option in fields(MethodOptions)})
    singles = [fuse([adapter], gating=args.gating, allow_overlap=True) for adapter in adapters]
    if isinstance(METHODS[args.method], AdapterMerge):
        parts = adapters if args.gating is None else singles
        fused = distill_adapters(lambda: open_base(args.base, args, None), parts, args, args.strength)
    else:
        refuse_distillation_settings(args, "--method distill", leave=["seed"])
        fused = fuse(
            adapters,
            args.strength,
            args.method,
            options=options,
            pipe=open_base(args.base, args, None) if METHODS[args.method].needs_base else None,
            gating=args.gating,
            rank=args.rank,
            energy=args.energy,
            allow_overlap=args.allow_overlap,
            name=target.stem,
        )
    report = compatibility(singles)
    # What was fused in spite of a refusal, the method or --allow_overlap permits.
    print_compatibility("caution" if report.verdict == "refused" else report.verdict, report)
    with finished_later(args) if isinstance(METHODS[args.method], AdapterMerge) else nullcontext():
        Library(target.parent).replace(fused, target.stem, args.dtype, overwrite=args.overwrite)
    tokens = [concept.token for concept in fused.info.concepts]
    print(f"wrote {target} ({file_size(target)}): {' '.join(tokens) or 'no concept tokens'}")
    if picture := join_adapter_pictures(files, target):
        print(f"wrote {picture}: the pictures of its parts")
    base = fused.info.base
    on = base_flags(args.base, args)
    if not on and base and base.name != "pocket":
        on = ["--base", f".../{base.name}" if base.name != "unnamed" else "..."]
    prompt = " beside ".join(f"a {token}" for token in tokens) or "a photo"
    if isinstance(METHODS[args.method], AdapterMerge):
        file = target.with_name(f"{target.stem}_lora.safetensors")
        print(f"next: {example('export', target, '--to', 'kohya', '-o', file)}")
    else:
        print(f"next: {example('generate', target, *on, '--prompt', prompt)}")


def renamed(adapters: list[Any], renames: list[str]) -> list[Any]:
    """The adapters with tokens renamed. Each rename takes the last adapter that has the token."""
    for rename in renames:
        old, equals, new = rename.partition("=")
        owners = [i for i, adapter in enumerate(adapters) if old in {c.token for c in adapter.info.concepts}]
        if not (equals and owners):
            known = ", ".join(c.token for adapter in adapters for c in adapter.info.concepts) or "none"
            raise UsageError(f'--rename takes "<old>=<new>", got "{rename}"; the tokens are: {known}.')
        adapters[owners[-1]] = adapters[owners[-1]].renamed({old: new})
    return adapters
