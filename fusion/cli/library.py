"""List, import, rename and delete the adapters of a folder, and show who owns which slice.

Adapters go by the names of their files, without the ending.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from fusion.cli.console import UsageError, add_base_arguments, file_size, open_base, print_table


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion library [DIR] [options]"
    parser.epilog = 'example: fusion library out --rename robot robo --tokens "<robot>=<robo>"'
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("out"), metavar="DIR", help="the library (default: out)")
    add(
        "--add",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="import copies of adapter files, diffusers LoRAs or kohya LoRAs",
    )
    add("--rename", nargs=2, metavar=("OLD", "NEW"), help="rename an adapter; with --tokens, NEW may be OLD")
    add("--tokens", nargs="+", default=[], metavar="<OLD>=<NEW>", help="with --rename: change its tokens too")
    add("--delete", nargs="+", default=[], metavar="NAME", help="delete adapters for good")
    add("--slices", action="store_true", help="show who owns which directions of the base, and which are free")
    add_base_arguments(parser)


def run(args: Namespace) -> None:
    from fusion.errors import FormatError
    from fusion.library.library_folder import Library

    library = Library(args.folder)
    if not args.folder.is_dir() and not args.add:
        raise FormatError(f"'{args.folder}' is no folder; name the library, or --add adapters to make it one.")
    if args.tokens and not args.rename:
        raise UsageError("--tokens goes with --rename OLD NEW.")
    for path in args.add:
        print(f"added {library.add(path)}")
    if args.rename:
        print(f"renamed to {library.rename(*args.rename, tokens=dict(map(pair, args.tokens)))}")
    for name in args.delete:
        library.remove(name)
        print(f"deleted {name}")
    entries = library.adapters()
    if not (args.add or args.rename or args.delete):
        rows = [row(entry) for entry in entries]
        print_table([("name", "concepts", "nouns", "slice", "base", "size"), *rows])
    if args.slices:
        # Directions are numbered alike in every precision, and half takes half the memory.
        print_slices(open_base(args.base, args, args.dtype or "bfloat16"), library)


def pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise UsageError(f'--tokens takes "<old>=<new>", got "{text}".')
    return old, new


def row(entry: Any) -> tuple[str, ...]:
    concepts = entry.info.concepts
    slices = ", ".join(map(str, entry.slices)) or "-"
    nouns = ", ".join(c.noun for c in concepts if c.noun) or "-"
    base = entry.info.base.name if entry.info.base else "-"
    return entry.path.stem, " ".join(c.token for c in concepts) or "-", nouns, slices, base, file_size(entry.path)


def print_slices(pipe: Any, library: Any) -> None:
    from fusion.library.slice_maps import slice_map

    slices = slice_map(pipe, library)
    print(f"{slices.base.name}: {slices.free} of {slices.capacity} directions are free")
    for owner in slices.owners:
        print(f"  {owner.slice}  {owner.owner}")
