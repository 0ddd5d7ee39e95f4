"""Look at pictures before teaching: which cannot be used, are small, or nearly the same; how they will be cut."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusion.cli.console import labelled


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion check DIR [options]"
    parser.epilog = "example: fusion check photos/rex -o cut.png"
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of pictures")
    add("--resolution", type=int, metavar="N", help="side of training pictures (default: pocket's)")
    add("-o", "--output", type=Path, metavar="PNG", help="also write all pictures as they will be cut, on one sheet")


def run(args: Namespace) -> int:
    from fusion.config import read_base_defaults
    from fusion.evaluation.sheets import contact_sheet
    from fusion.models.pipelines import pocket
    from fusion.training.dataset_files import is_picture, visible
    from fusion.training.picture_checks import check_pictures

    resolution = args.resolution or read_base_defaults(pocket(), "training").get("resolution", 512)
    found = check_pictures([path for path in visible(args.folder) if is_picture(path)], resolution)
    for look in found.looks:
        labelled(f"{look.path.name}: ", " ".join(look.notes) or f"{look.size[0]}x{look.size[1]}, fine")
    for warning in found.warnings:
        print(f"warning: {warning}")
    usable = [(look.crop, look.path.name) for look in found.looks if look.crop]
    print(f"{len(usable)} of {len(found.looks)} pictures can be used.")
    if args.output and usable:
        contact_sheet([usable[i : i + 4] for i in range(0, len(usable), 4)]).save(args.output)
        print(f"wrote {args.output}")
    return 0 if usable else 1
