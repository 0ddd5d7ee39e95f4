"""Write a Space for the Hugging Face Hub that runs the studio: on a free CPU at once, with the embedded base."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusion.cli.console import add_overwrite


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion space --output_dir DIR [options]"
    parser.epilog = "example: fusion space --output_dir space, then: hf upload user/studio space --repo-type space"
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, metavar="DIR", help="the folder of the Space")
    text = "a wheel of this package (default: built from the checkout that this command runs from)"
    add("--wheel", type=Path, metavar="FILE", help=text)
    add("--title", default="spectral-fusion", metavar="TEXT", help="of the Space (default: spectral-fusion)")
    add_overwrite(parser)


def run(args: Namespace) -> None:
    from fusion.hub.space import write_space

    folder = write_space(args.output_dir, wheel=args.wheel, title=args.title, overwrite=args.overwrite)
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"next: hf upload USER/NAME {folder} --repo-type space")
