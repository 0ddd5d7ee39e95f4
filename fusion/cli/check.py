"""Check pictures before training: which cannot be used, are small or nearly the same, and how they will be cut."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusion.cli.console import add_overwrite, print_labelled
from fusion.output_files import check_output


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion check DIR [options]"
    parser.epilog = "example: fusion check photos/rex -o cut.png"
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of pictures")
    add("--resolution", type=int, metavar="N", help="side of training pictures (default: pocket's)")
    add("-o", "--output", type=Path, metavar="PNG", help="also write all pictures as they will be cut, on one sheet")
    add_overwrite(parser)


def run(args: Namespace) -> int:
    from fusion.config import read_base_defaults
    from fusion.evaluation.sheets import contact_sheet
    from fusion.formats.png_file import write_png
    from fusion.models.embedded_models import pocket
    from fusion.training.dataset_files import is_picture, visible
    from fusion.training.picture_checks import check_pictures

    if args.output:
        check_output(args.output, endings=(".png",), overwrite=args.overwrite)
    resolution = args.resolution or read_base_defaults(pocket(), "training").get("resolution", 512)
    checks = check_pictures([path for path in visible(args.folder) if is_picture(path)], resolution)
    for check in checks.pictures:
        print_labelled(f"{check.path.name}: ", " ".join(check.warnings) or f"{check.size[0]}x{check.size[1]}, fine")
    for warning in checks.warnings:
        print(f"warning: {warning}")
    usable = [(check.crop, check.path.name) for check in checks.pictures if check.crop]
    print(f"{len(usable)} of {len(checks.pictures)} pictures can be used.")
    if args.output and usable:
        sheet = contact_sheet([usable[i : i + 4] for i in range(0, len(usable), 4)])
        print(f"wrote {write_png(args.output, sheet)}")
    return 0 if usable else 1
