"""Check pictures before training: what `train` would read, with captions and masks, and how it will be cut.

Takes the same --config and settings as `train`. Without a token, captions are read for the only one that they name.
"""

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.console import UsageError, add_overwrite, add_settings, flags_of, print_labelled, print_list
from fusion.config import TOKEN, read_base_defaults
from fusion.errors import ConfigError
from fusion.output_files import check_output
from fusion.training.config import TrainingConfig
from fusion.training.setting_warnings import warnings_about

if TYPE_CHECKING:  # help must be immediate
    from fusion.training.buckets import Size
    from fusion.training.dataset import Dataset, Example

SETTINGS = (
    *("pretrained_model_name_or_path", "token", "instance_data_dir", "instance_prompt", "repeats", "resolution"),
    *("trigger_word", "caption_extension", "shuffle_caption", "keep_tokens", "keep_tokens_separator"),
    *("caption_dropout_rate", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
    *("use_masks", "unmasked_weight", "gating", "train_batch_size", "seed", "base_config"),
)
ANY_TOKEN = "<concept>"  # where nobody says which
FIRST_BATCHES = 3  # that are shown where captions or sizes differ between them
USUAL = 512, 8  # where a base's configs are not on this machine: Stable Diffusion's


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
    from PIL import ImageOps

    from fusion.evaluation.sheets import contact_sheet
    from fusion.formats.png_file import write_png
    from fusion.models.embedded_models import pocket
    from fusion.training.buckets import training_sizes
    from fusion.training.dataset import check_dataset
    from fusion.training.picture_checks import check_pictures

    config = configure(args)
    if args.output:
        check_output(args.output, endings=(".png",), overwrite=args.overwrite)
    base = config.pretrained_model_name_or_path or pocket()
    defaults = read_base_defaults(base, "training")
    dataset, paths, problems = check_dataset(config)
    if config.token == ANY_TOKEN:
        tokens = {token for example in dataset.examples for token in TOKEN.findall(example.caption)} - {ANY_TOKEN}
        if len(tokens) == 1:
            config = config.updated({"token": tokens.pop(), "gating": flags_of(args, TrainingConfig).get("gating")})
            dataset, paths, problems = check_dataset(config)
    folder, examples = config.instance_data_dir, {example.image_path: example for example in dataset.examples}
    config = config.with_base_defaults(defaults)
    native, multiple = native_resolution(config.base_config or base)
    resolution = config.resolution or native
    sizes = training_sizes(config, resolution, multiple)
    checks = check_pictures(paths, resolution, sizes)
    cuts: list[tuple[Any, str]] = []
    for check in checks.pictures:
        name, example = check.path.relative_to(folder).as_posix(), examples.get(check.path)
        if check.crop and example:
            size = f"{check.size[0]}x{check.size[1]}"
            print_list([f"{name}: {' '.join(check.warnings) or f'{size}, fine'} {about(example, folder)}"])
            side = max(check.crop.size)
            crop = ImageOps.pad(check.crop, (side, side), color="white") if config.enable_bucket else check.crop
            cuts.append((crop, f"{name}\n{example.caption}"))
    if dataset.examples and not problems:
        print_batches(config, dataset, sizes)
    for warning in [*dataset.warnings, *checks.warnings, *warnings_about(config)]:
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


def native_resolution(base: str | Path) -> tuple[int, int]:
    """The side of the pictures that a base draws, and that of a latent position in pixels, as its configs say."""
    from fusion.base_models.single_file import configs_of, read_single_file

    folder = configs_of(read_single_file(Path(base)).family) if os.path.isfile(base) else Path(base)  # noqa: PTH113
    files = [folder / part / "config.json" for part in ("unet", "vae")]
    if not all(file.is_file() for file in files):
        return USUAL
    unet, vae = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    multiple = 2 ** (len(vae["block_out_channels"]) - 1)
    return unet["sample_size"] * multiple, multiple


def print_batches(config: TrainingConfig, dataset: "Dataset", sizes: "Sequence[Size]") -> None:
    """Print the buckets, and the first batches as `train` will use them."""
    if config.enable_bucket:
        buckets = dataset.buckets(sizes).items()
        parts = [f"{w}x{h} {len(examples)} picture{'s' * (len(examples) > 1)}" for (w, h), examples in buckets]
        print_labelled("buckets: ", ", ".join(parts))
    if not (config.enable_bucket or config.varies_captions()):
        return
    order = dataset.order(config.train_batch_size, config.seed, sizes)
    for number in range(FIRST_BATCHES):
        examples = [dataset.examples[index] for index in order.batch(number)]
        uses = [f'{e.image_path.name} "{e.caption_in(config, number, i)}"' for i, e in enumerate(examples)]
        print_labelled(f"batch {number + 1}: ", "; ".join(uses))


def about(example: "Example", folder: Path) -> str:
    """The caption, the repeats and the mask of an example."""
    times = f", {example.repeats} times an epoch" if example.repeats > 1 else ""
    mask = f", mask {example.mask_path.relative_to(folder).as_posix()}" if example.mask_path else ""
    return f'"{example.caption}"{times}{mask}'
