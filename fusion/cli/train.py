"""Train an adapter for a concept on a folder of pictures.

Settings come from flags, then from the file given with --config, then from the base's own fusion.toml, then from the
defaults below, which suit Stable Diffusion 1.5. --print_config shows what applies.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from fusion.cli.console import (
    UsageError,
    add_overwrite,
    add_settings,
    base_flags,
    example,
    file_size,
    flags_of,
    open_base,
    relative,
    resume_hint,
)
from fusion.cli.progress_bar import progress, show_phases, with_progress
from fusion.cli.push import add_hub_options, hub_options, push_adapter
from fusion.config import read_base_defaults
from fusion.errors import ConfigError, OutOfMemory, OutputError
from fusion.output_files import check_output
from fusion.training.config import TrainingConfig
from fusion.training.presets import PRESETS, preset

logger = logging.getLogger(__name__)

PRECISION = {"auto": None, "no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'fusion train --instance_data_dir DIR --token "<name>" --noun WORD [options]'
    parser.epilog = "example: fusion train --config owl.toml --rank 4 --validation_prompt 'a {token} in the snow'"
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML, same names as the flags")
    parser.add_argument("--print_config", action="store_true", help="print all settings as TOML, and stop")
    parser.add_argument("--device", metavar="NAME", help="cpu, gpu, cuda:1, mps, ... (default: the best there is)")
    how = ", ".join(f"{name} ({share:g})" for name, share in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, help=f"how much of the base's usual steps to train: {how}")
    add_overwrite(parser)
    hub = parser.add_argument_group("hub")
    hub.add_argument("--push_to_hub", action="store_true", help="share the adapter on the Hugging Face Hub at the end")
    hub.add_argument("--hub_model_id", metavar="USER/NAME", help="the repository (default: the adapter's name, yours)")
    add_hub_options(hub)
    add_settings(parser, TrainingConfig)


def configure(args: argparse.Namespace) -> TrainingConfig:
    """Flags over file. Raises UsageError: a wrong setting is a wrong command."""
    flags = flags_of(args, TrainingConfig)
    try:
        config = TrainingConfig.from_toml(args.config, flags) if args.config else TrainingConfig.from_values(flags)
        if args.preset and "max_train_steps" not in flags:
            base = read_base_defaults(config.pretrained_model_name_or_path or pocket_folder(), "training")
            config = config.updated(preset(args.preset, base))
        return config
    except ConfigError as error:
        raise UsageError(str(error)) from None


def pocket_folder() -> Path:
    from fusion.models.embedded_models import pocket

    return pocket()


def run(args: argparse.Namespace) -> None:
    from fusion.training.optimizers import check_optimizer

    config = configure(args)
    if args.print_config:
        base = config.pretrained_model_name_or_path or pocket_folder()
        print(as_toml(config, read_base_defaults(base, "training")))
        return
    check_optimizer(config)
    check_outputs(config, overwrite=args.overwrite)
    repository = check_hub(args, config)
    base = config.pretrained_model_name_or_path
    defaults = read_base_defaults(base or pocket_folder(), "training")
    dtype = PRECISION[config.with_base_defaults(defaults).mixed_precision]
    pipe = open_base(base, args, dtype, config)
    last, target = follow(pipe, config, args)
    slices = ", ".join(map(str, last.adapter.slices))
    where = f" on slice {slices}" if slices else ""
    print(f"wrote {target} ({file_size(target)}): {config.token}{where}, {last.step} steps in {last.seconds:.0f} s")
    if config.num_validation_images:
        write_picture(pipe, config, last, target)
    if repository:
        share(target, repository, config, args)
    print(f"next: {example('generate', target, *base_flags(base, config), '--prompt', f'a {config.token}')}")


def check_outputs(config: TrainingConfig, *, overwrite: bool) -> None:
    """Refuse now where the adapter or its previews could not be written at the end, or would replace another's."""
    from fusion.formats.adapter_file import check_adapter_output

    check_adapter_output(adapter_path(config), [config.token], overwrite=overwrite)
    check_output(preview_path(config, config.max_train_steps, 0), overwrite=True)


def check_hub(args: argparse.Namespace, config: TrainingConfig) -> str | None:
    """The repository, created, where the adapter is pushed at the end. Raises OutputError where that is not possible.

    The token is left out of the words of the command, which are printed where the training can be resumed.
    """
    if not args.push_to_hub:
        if args.hub_model_id or args.hub_token:
            raise UsageError("--hub_model_id and --hub_token go with --push_to_hub.")
        return None
    from fusion.hub.repository import check_push

    hidden = {i + n for i, word in enumerate(args.words) if word == "--hub_token" for n in (0, 1)}
    args.words = [w for i, w in enumerate(args.words) if i not in hidden and not w.startswith("--hub_token=")]
    return check_push(args.hub_model_id or config.name, **hub_options(args))


def share(target: Path, repository: str, config: TrainingConfig, args: argparse.Namespace) -> None:
    """Push the adapter with its picture; it is saved already, so an error says how to push it again."""
    from fusion.formats.adapter_file import load

    picture, prompt = target.with_suffix(".png"), picture_prompt(config)
    try:
        pictures = {picture: prompt} if config.num_validation_images and picture.is_file() else {}
        base = config.pretrained_model_name_or_path
        push_adapter(load(target), repository, args, base=base and str(base), pictures=pictures)
    except OutputError as error:
        raise OutputError(
            f"{error} The adapter is saved; share it with: {example('push', target, repository)}"
        ) from None


def adapter_path(config: TrainingConfig) -> Path:
    return relative(config.library or config.output_dir) / f"{config.name}.safetensors"


def preview_path(config: TrainingConfig, step: int, number: int) -> Path:
    return relative(config.output_dir) / "samples" / f"{config.name}-{step:05d}-{number}.png"


def follow(pipe: Any, config: TrainingConfig, args: argparse.Namespace) -> tuple[Any, Path]:
    """Train with a progress bar; returns the last step and the adapter's file."""
    from fusion.training.loop import train

    print(f"training {config.token} on {relative(config.instance_data_dir)}", flush=True)
    step, checkpoint = None, None
    target = adapter_path(config)
    try:
        with progress() as advance, closing(train(pipe, config, on_progress=show_phases(advance))) as training:
            try:
                for step in with_progress(training, advance):
                    save_previews(step, config)
                    if step.step == step.total:  # while the slice is still reserved
                        target = save_adapter(training, step, config, args)
            except (KeyboardInterrupt, OSError, OutOfMemory, RuntimeError):
                if step is not None:
                    save_previews(step, config)  # which the interruption may have kept from being written
                checkpoint = last_checkpoint(training, config, step)
                raise
    except (KeyboardInterrupt, OSError, OutOfMemory, RuntimeError):
        if step is None:
            print(f"stopped before the first step. {first_step_hint(config)}", file=sys.stderr)
        else:
            hint = resume_hint(checkpoint, config.resume_from_checkpoint, args.words)
            print(f"stopped after step {step.step}. {hint}", file=sys.stderr)
        raise
    return step, target


def first_step_hint(config: TrainingConfig) -> str:
    """A sentence for who stops a training before its first step: what the next one need not do again."""
    parts = ["the singular directions that were computed"]
    if config.uses_class_pictures() and (count := len(list(config.class_folder().glob("*.png")))):
        parts.append(f"{count} class pictures in '{relative(config.class_folder())}'")
    resumed = f", and the checkpoint {config.resume_from_checkpoint}" if config.resume_from_checkpoint else ""
    return f"Kept for the next start: {' and '.join(parts)}{resumed}."


def last_checkpoint(training: Any, config: TrainingConfig, step: Any) -> Path | None:
    """End a training, which writes a checkpoint of its last step; returns the newest of its run."""
    from fusion.formats.checkpoint_file import newest_checkpoint
    from fusion.training.loop import checkpoint_folder

    with suppress(KeyboardInterrupt):
        training.throw(KeyboardInterrupt)  # where it has ended already, it does nothing
    return newest_checkpoint(checkpoint_folder(config) / step.adapter.info.provenance.run) if step else None


def save_adapter(training: Any, step: Any, config: TrainingConfig, args: argparse.Namespace) -> Path:
    """Save the adapter of the last step; where that is not possible, the error says how it can be finished."""
    from fusion.formats.adapter_file import save
    from fusion.library.library_folder import Library

    target, dtype = adapter_path(config), config.save_precision
    library = Library(target.parent)
    try:
        return library.replace(step.adapter, config.name, dtype, overwrite=args.overwrite)
    except OutputError as error:
        problem = error
    with suppress(OutputError):  # it became another's while this training ran
        path = library.save(step.adapter, config.name, dtype)
        logger.warning("%s The adapter is saved as '%s'.", problem, path)
        return path
    checkpoint = last_checkpoint(training, config, step)
    hint = resume_hint(checkpoint, config.resume_from_checkpoint, args.words)
    if checkpoint is not None and checkpoint.name == f"checkpoint-{step.total}":
        raise OutputError(f"{problem} The training is done. {hint}")
    try:
        path = Path(tempfile.mkdtemp(prefix="fusion-adapter-")) / target.name
        save(step.adapter, path, dtype)
    except (OSError, OutputError):
        raise OutputError(f"{problem} {hint}") from None
    command = example("library", target.parent, "--add", path)
    raise OutputError(f"{problem} The adapter is in '{path}' instead; add it to the library with: {command}")


def write_picture(pipe: Any, config: TrainingConfig, last: Any, target: Path) -> None:
    """A picture for the library beside the adapter, which is saved already: no problem here ends the command."""
    from fusion.generation.adapter_pictures import draw_adapter_picture, save_adapter_picture

    prompt = picture_prompt(config)
    try:
        images = last.images
        if not images:
            leave_out = "Ctrl+C skips it; --num_validation_images 0 leaves it out"
            print(f'drawing a picture for the library, "{prompt}" ({leave_out})', flush=True)
            with progress() as advance:
                images = [draw_adapter_picture(pipe, last.adapter, prompt, seed=config.seed, on_step=advance)]
        file = save_adapter_picture(target, images[0])
        print(f"wrote {file}" if file else f"{target.with_suffix('.png')} is another picture, and stays as it is")
    except KeyboardInterrupt:
        print("no picture, as you wish; the adapter is saved")
    except Exception as error:
        print(f"warning: no picture could be drawn: {error}", file=sys.stderr)


def picture_prompt(config: TrainingConfig) -> str:
    return (*config.validation_prompts(), config.with_token(config.instance_prompt))[0]


def save_previews(step: Any, config: TrainingConfig) -> None:
    """Write a step's previews to the samples folder."""
    from fusion.formats.png_file import write_png

    try:
        for number, image in enumerate(step.images):
            write_png(preview_path(config, step.step, number), image)
    except OutputError as error:
        logger.warning("%s The training goes on.", error)


def as_toml(config: TrainingConfig, base: Mapping[str, Any]) -> str:
    """What the user has set, and as comments what applies to the rest: the base's own defaults, then ours."""
    given, whole = config.settings(), config.with_base_defaults(base)
    lines = config.updated({name: getattr(whole, name) for name in type(config).model_fields}).to_toml().splitlines()
    left = [f"# {line}" for line in lines if line.partition(" ")[0] not in given]
    return "\n".join([config.to_toml(), "# Not set, so this applies:", *left])
