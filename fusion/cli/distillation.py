"""What `fuse --method distill` and `export --distill` share: settings, progress, Ctrl+C and the line of the result."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fusion.cli.console import UsageError, add_settings, example, flags_of, relative, resume_hint
from fusion.cli.progress_bar import progress, show_phases, with_progress
from fusion.distillation.config import DistillationConfig
from fusion.errors import ConfigError, OutputError

# What the verbs have flags of their own for: --rank, and --output, which says where checkpoints go.
OF_THE_VERBS = ("rank", "output_dir", "output_name")


def add_distillation_settings(parser: ArgumentParser, leave: Sequence[str] = ()) -> None:
    """A flag for every setting of a distillation but those of `leave`."""
    add_settings(parser, DistillationConfig, (*OF_THE_VERBS, *leave), prefix="distill: ")


def refuse_distillation_settings(args: Namespace, instead: str, leave: Sequence[str] = ()) -> None:
    """Raise UsageError for settings of a distillation where there is none."""
    if flags := flags_of(args, DistillationConfig).keys() - {*OF_THE_VERBS, *leave}:
        raise UsageError(f"--{sorted(flags)[0]} is a setting of {instead}; add that, or leave it out.")


def distill_adapters(
    open_pipe: Callable[[], Any], adapters: Sequence[Any], args: Namespace, strengths: Sequence[float] | None = None
) -> Any:
    """The distilled adapter, learned with a progress bar. Raises UsageError for a wrong setting."""
    from fusion.distillation.loop import distill
    from fusion.formats.checkpoint_file import newest_checkpoint

    config = distillation_config(args)
    concepts = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    print(f"distilling {' '.join(concepts)}", flush=True)
    step, start = None, partial(distill, open_pipe(), adapters, config, strengths=strengths)
    try:
        with progress() as advance, closing(start(on_progress=show_phases(advance))) as distillation:
            try:
                for latest in with_progress(distillation, advance):
                    step = latest
            except KeyboardInterrupt:
                with suppress(KeyboardInterrupt):  # which writes a checkpoint of the last step
                    distillation.throw(KeyboardInterrupt())
                raise
    except KeyboardInterrupt:
        checkpoint = newest_checkpoint(config.checkpoint_folder / step.run) if step else None
        hint = resume_hint(checkpoint, config.resume_from_checkpoint, args.words)
        print(f"stopped after step {step.step if step else 0}. {hint}", file=sys.stderr)
        raise
    assert step is not None and step.adapter is not None and step.errors is not None
    print(f"{step.step} steps in {step.seconds:.0f} s: {step.errors.sentence(len(concepts))}")
    return step.adapter


@contextmanager
def finished_later(args: Namespace) -> Generator[None]:
    """Where the result of a distillation cannot be written, say how its last checkpoint finishes it."""
    try:
        yield
    except OutputError as error:
        config = distillation_config(args)
        if config.checkpointing_steps:
            hint = example(*args.words, "--resume_from_checkpoint", "latest")
            raise OutputError(f"{error} When that is mended, finish it from its last checkpoint with: {hint}") from None
        raise


def distillation_config(args: Namespace) -> DistillationConfig:
    """The settings of the command line; checkpoints go beside the output. Raises UsageError."""
    output: Path = relative(args.output.absolute())
    if args.energy is not None:
        raise UsageError("--energy compresses finished changes; a distilled LoRA has the rank that --rank says.")
    values = {name: value for name, value in flags_of(args, DistillationConfig).items() if value is not None}
    places = {"output_dir": output.parent, "output_name": output.stem}
    try:
        return DistillationConfig.from_values({**values, **places})
    except ConfigError as error:
        raise UsageError(str(error)) from None
