"""Check pictures before training: what `train` would read, with captions and masks, and how it will be cut.

Takes the same --config and settings as `train`. Without a token, captions are read for the only one that they name.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.console import UsageError, add_overwrite, add_settings, flags_of, print_list
from fusion.config import TOKEN, read_base_defaults
from fusion.errors import ConfigError
from fusion.output_files import check_output
from fusion.training.config import TrainingConfig

if TYPE_CHECKING:  # help must be immediate
    from fusion.training.dataset import Example

SETTINGS = (
    *("pretrained_model_name_or_path", "token", "instance_data_dir", "instance_prompt", "repeats", "resolution"),
    *("use_masks", "unmasked_weight", "gating"),
)
ANY_TOKEN = "<concept>"  # where nobody says which


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion check DIR [options]"
    parser.epilog = 'example: fusion check photos/rex --token "<rex>" -o cut.png'
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="folder of pictures, as --instance_data_dir")
    add("--config", type=Path, metavar="FILE", help="settings as TOML, as for train")
    add("-o", "--output", type=Path, metavar="PNG", help="also write all pictures as they will be cut, on one sheet")
    add_overwrite(parser)
    add_settings(parser, TrainingConfig, leave=[name for name in TrainingConfig.model_fields if name not in SETTINGS])


def run(args: Namespace) -> int:
    from fusion.evaluation.sheets import contact_sheet
    from fusion.formats.png_file import write_png
    from fusion.models.embedded_models import pocket
    from fusion.training.dataset import check_dataset
    from fusion.training.picture_checks import check_pictures

    config = configure(args)
    if args.output:
        check_output(args.output, endings=(".png",), overwrite=args.overwrite)
    base = read_base_defaults(config.pretrained_model_name_or_path or pocket(), "training")
    dataset, paths, problems = check_dataset(config)
    if config.token == ANY_TOKEN:
        tokens = {token for example in dataset.examples for token in TOKEN.findall(example.caption)} - {ANY_TOKEN}
        if len(tokens) == 1:
            config = config.updated({"token": tokens.pop(), "gating": flags_of(args, TrainingConfig).get("gating")})
            dataset, paths, problems = check_dataset(config)
    folder, examples = config.instance_data_dir, {example.image_path: example for example in dataset.examples}
    checks = check_pictures(paths, config.with_base_defaults(base).resolution or 512)
    cuts: list[tuple[Any, str]] = []
    for check in checks.pictures:
        name, example = check.path.relative_to(folder).as_posix(), examples.get(check.path)
        if check.crop and example:
            size = f"{check.size[0]}x{check.size[1]}"
            print_list([f"{name}: {' '.join(check.warnings) or f'{size}, fine'} {about(example, folder)}"])
            cuts.append((check.crop, f"{name}\n{example.caption}"))
    for warning in [*dataset.warnings, *checks.warnings, *config.idle_settings()]:
        print(f"warning: {warning}")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(cuts)} of {len(checks.pictures)} pictures can be used.")
    if args.output and cuts:
        sheet = contact_sheet([cuts[i : i + 4] for i in range(0, len(cuts), 4)])
        print(f"wrote {write_png(args.output, sheet)}")
    if problems and cuts:
        print("train refuses the folder until the problems are mended.")
    return 1 if problems else 0


def configure(args: Namespace) -> TrainingConfig:
    """Flags over file, as for train; a folder is enough. Raises UsageError."""
    flags = flags_of(args, TrainingConfig)
    if args.folder:
        if "instance_data_dir" in flags:
            raise UsageError("The folder is given twice, as DIR and as --instance_data_dir; give it once.")
        flags["instance_data_dir"] = str(args.folder)
    if not args.config and "token" not in flags:
        flags = {"token": ANY_TOKEN, "gating": "none"} | flags
    try:
        return TrainingConfig.from_toml(args.config, flags) if args.config else TrainingConfig.from_values(flags)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def about(example: "Example", folder: Path) -> str:
    """The caption, the repeats and the mask of an example."""
    times = f", {example.repeats} times an epoch" if example.repeats > 1 else ""
    mask = f", mask {example.mask_path.relative_to(folder).as_posix()}" if example.mask_path else ""
    return f'"{example.caption}"{times}{mask}'
