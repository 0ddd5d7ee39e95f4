"""Make several adapters one. Says first how they get along."""

import argparse
from pathlib import Path

from fusion.cli.console import DTYPES, UsageError, example, size, verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fusion fuse ADAPTER ... -o FILE [options]"
    parser.epilog = "example: fusion fuse dog.safetensors cat.safetensors -o pets.safetensors --strength 1 0.8"
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the fused adapter, .safetensors")
    add("--strength", nargs="+", type=float, metavar="X", help="one number for each adapter (default: 1)")
    add("--method", default="direct_sum", metavar="NAME", help="direct_sum (default) or average")
    add(
        "--gating", choices=("tokens", "none"), help="override how the adapters are gated (default: as their files say)"
    )
    add(
        "--rename",
        action="append",
        default=[],
        metavar="<OLD>=<NEW>",
        help="rename a token of the last adapter that has it",
    )
    add(
        "--rank",
        type=int,
        metavar="N",
        help="compress to this rank; merges all into one LoRA, which gates cannot tell apart",
    )
    add("--energy", type=float, metavar="X", help="compress, keeping this share of each layer's energy, as 0.99")
    add("--allow_overlap", action="store_true", help="let adapters share singular directions under direct_sum")
    add("--dtype", default="float16", metavar="TYPE", choices=DTYPES, help="of the file (default: float16)")


def run(args: argparse.Namespace) -> None:
    from fusion.composition.fusing import fuse
    from fusion.composition.verdict import compatibility
    from fusion.formats.native import save
    from fusion.formats.reading import load

    adapters = renamed([load(path) for path in args.adapters], args.rename)
    regated = [fuse([adapter], gating=args.gating) for adapter in adapters] if args.gating else adapters
    report = compatibility(regated)
    if report.verdict != "refused":
        verdict(report.verdict, report)
    fused = fuse(
        adapters,
        args.strength,
        args.method,
        gating=args.gating,
        rank=args.rank,
        energy=args.energy,
        allow_overlap=args.allow_overlap,
        name=args.output.stem,
    )
    if report.verdict == "refused":  # not by this method, or not with this permission
        verdict("caution", report)
    save(fused, args.output, dtype=args.dtype)
    tokens = " ".join(concept.token for concept in fused.info.concepts)
    print(f"wrote {args.output} ({size(args.output)}): {tokens or 'no concept tokens'}")
    base = fused.info.base
    on = ["--base", f".../{base.name}"] if base and base.name != "pocket" else []
    print(f"next: {example('generate', args.output, *on, '--prompt', prompt(fused))}")


def renamed(adapters: list, renames: list[str]) -> list:
    """The adapters with tokens renamed. Each rename takes the last adapter that has the token."""
    for rename in renames:
        old, equals, new = rename.partition("=")
        if not equals:
            raise UsageError(f'--rename takes "<old>=<new>", got "{rename}".')
        owners = [i for i, a in enumerate(adapters) if old in {c.token for c in a.info.concepts}]
        if not owners:
            known = ", ".join(c.token for a in adapters for c in a.info.concepts) or "none"
            raise UsageError(f"No adapter has the token {old}; there are: {known}.")
        adapters[owners[-1]] = adapters[owners[-1]].renamed({old: new})
    return adapters


def prompt(adapter) -> str:
    """Something to type that uses every concept."""
    return " beside ".join(f"a {concept.token}" for concept in adapter.info.concepts) or "a photo"
