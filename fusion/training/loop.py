"""train(): from pictures of a concept to an adapter, as a generator of steps.

The command line, the studio and the tests iterate over it. Close the generator to stop, and the pipeline is as it was
before.
"""

import logging
import math
import secrets
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image

from fusion.adapters.adapter import Adapter
from fusion.adapters.layer_stacks import LayerStacks
from fusion.errors import FusionError
from fusion.formats.checkpoint_file import Checkpoint, RunCheckpoints, prepare_folder
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.generation.pipeline_call import check_start
from fusion.layer_names import component_of
from fusion.models.attachment import attach
from fusion.models.denoising import check_clip_skip, check_denoises
from fusion.models.devices import explained_memory
from fusion.models.layer_sites import Site
from fusion.models.noise_schedule import check_noise
from fusion.models.pipeline import Pipeline, check_resident
from fusion.models.pipelines import base_defaults, base_info
from fusion.models.prompt_chunks import check_writes_vectors
from fusion.output_files import check_output
from fusion.progress import OnPhase
from fusion.training import setup
from fusion.training.accelerator import accelerated, check_tracker, frozen, precision
from fusion.training.checkpoint import find_checkpoint, slice_of
from fusion.training.config import TrainingConfig
from fusion.training.cuda_graphs import CapturedGradients, can_capture
from fusion.training.determinism import deterministic_algorithms
from fusion.training.optimizers import build_optimizer, check_optimizer
from fusion.training.quiet_loss import QuietLoss
from fusion.training.setting_warnings import warnings_about
from fusion.training.step import BatchGradients
from fusion.training.training_data import TrainingData

logger = logging.getLogger(__name__)

MIN_SCALE = 2.0**-14  # of the gradient scaler; gradients that overflow even so are not a matter of scale


@dataclass(frozen=True)
class TrainStep:
    """What one optimizer step did. `adapter` is live: save it to keep this state, further steps change it."""

    step: int  # 1 … total
    total: int
    loss: float
    learning_rate: float
    adapter: Adapter
    seconds: float  # since the training began
    images: list[Image.Image] = field(default_factory=list[Image.Image])  # previews, at validation steps
    checkpoint: Path | None = None  # written at this step
    resumed: int = 0  # steps that were done before, by the checkpoint this training was resumed from


def train(pipe: Pipeline, config: TrainingConfig, *, on_progress: OnPhase | None = None) -> Generator[TrainStep]:
    """Train an adapter for one concept; the pipeline's own weights are never changed.

    Settings left open come from the base's `fusion.toml`. Everything is checked before the first step: pictures,
    targets, checkpoint, slice (reserved in the library for as long as training lasts). Resumed after its last step, a
    training yields that step once more, so that its adapter can be saved. Raises DatasetError, ConfigError,
    SliceConflict, UnknownName; FormatError for a damaged checkpoint; OutputError where checkpoints cannot be written;
    OutOfMemory, with the settings that help; FusionError when the loss is not finite.

    `on_progress(phase, done, total)` is called before every unit of what is done beside steps: class pictures, layers
    whose directions are computed, pictures that are encoded, passes for the quiet loss, steps of previews.

    Ctrl+C, a KeyboardInterrupt thrown into the generator, and any error end a training after a checkpoint of its last
    whole step. A checkpoint that cannot be written ends nothing; a warning says so.
    """
    config, targets, data = _checked(pipe, config)
    check_tracker(config)
    for sentence in warnings_about(config):
        logger.warning("%s", sentence)
    if config.checkpointing_steps:
        prepare_folder(checkpoint_folder(config), config.max_train_steps)
    settings, checkpoint = lasting_settings(pipe, config, data), None
    if name := config.resume_from_checkpoint:
        checkpoint = find_checkpoint(name, checkpoint_folder(config), settings)
    with (
        explained_memory(lambda: setup.memory_advice(config, data.resolution)),
        deterministic_algorithms(config.deterministic),
        setup.reserved_slice(pipe, config, targets, checkpoint and slice_of(checkpoint)) as directions,
        accelerated(pipe, config) as accelerator,
        frozen(pipe, config),
    ):
        data.prepare(on_progress, checkpoint and checkpoint.path.parent)
        layer_progress = on_progress and partial(on_progress, "computing the layers' singular directions")
        adapter = setup.fresh_adapter(pipe, config, targets, directions, layer_progress)
        setup.warn_about_gates(config, list(targets))
        stacks = LayerStacks(adapter.layers.values())
        with attach(pipe, adapter, live=stacks):
            training = _Training(pipe, config, adapter, stacks, data, accelerator, targets, checkpoint, on_progress)
            yield from training.steps()


def check_training(pipe: Pipeline, config: TrainingConfig) -> None:
    """Raise what `train` would raise before its first step: settings, layers, pictures or a slice that do not suit."""
    config, targets, _ = _checked(pipe, config)
    with setup.reserved_slice(pipe, config, targets):
        pass


def _checked(pipe: Pipeline, config: TrainingConfig) -> tuple[TrainingConfig, dict[str, Site], TrainingData]:
    """The settings with the base's defaults, the layers to adapt, and the pictures."""
    config = config.with_base_defaults(base_defaults(pipe, "training"))
    check_optimizer(config)
    check_resident(pipe, "Training")
    clip_skip = config.clip_skip
    if clip_skip is None:
        clip_skip = GenerationConfig(prompt="").with_base_defaults(base_defaults(pipe, "generation")).clip_skip
    check_clip_skip(pipe, clip_skip)
    config = config.updated({"mixed_precision": precision(pipe, config), "clip_skip": clip_skip})
    setup.check_base_name(pipe, config)
    check_noise(pipe.scheduler)
    check_denoises(pipe)
    check_writes_vectors(pipe)
    if config.validation_prompt and config.num_validation_images:
        check_start(pipe, None, None)
    return config, setup.target_sites(pipe, config), TrainingData(pipe, config)


def lasting_settings(
    pipe: Pipeline, config: TrainingConfig, data: TrainingData, adapter: Adapter | None = None
) -> dict[str, Any]:
    """Everything that shapes an adapter, in JSON values: a training is resumed under the same only.

    Its slice is that of the `adapter`, else the one that the config names, else None: any.
    """
    directions = adapter.slices[0] if adapter and adapter.slices else setup.named_slice(config)
    part = {"slice": directions.to_json() if directions else None}
    return {**base_info(pipe).lasting_settings(), **config.lasting_settings(), **part, **data.digests()}


def checkpoint_folder(config: TrainingConfig) -> Path:
    """Where the checkpoints of all runs of this output name are."""
    return config.output_dir / "checkpoints" / config.name


class _Training:
    """One training with an adapter that is attached live: what its steps read and change."""

    def __init__(
        self, pipe: Pipeline, config: TrainingConfig, adapter: Adapter, stacks: LayerStacks, data: TrainingData,
        accelerator: Accelerator, targets: Mapping[str, Site], checkpoint: Checkpoint | None,
        on_progress: OnPhase | None,
    ) -> None:  # fmt: skip
        self.on_progress = on_progress
        self.pipe, self.config, self.data, self.accelerator = pipe, config, data, accelerator
        self.run = (checkpoint and checkpoint.state.run) or secrets.token_hex(4)
        self.resumed = checkpoint.state.step if checkpoint else 0
        self.done = self.resumed  # the step whose state the parameters have
        self.checkpoints = RunCheckpoints(
            checkpoint_folder(config) / self.run, config.checkpointing_steps, config.checkpoints_total_limit, self.done
        )
        self.last_loss = checkpoint.state.loss if checkpoint else math.nan
        settings = lasting_settings(pipe, config, data, adapter)
        provenance = replace(adapter.info.provenance, run=self.run, settings=settings)
        self.adapter = replace(adapter, info=replace(adapter.info, provenance=provenance))
        captions = [example.caption for example in data.instances.examples]
        self.quiet_loss = None
        if config.quiet_loss_weight:
            progress = on_progress and partial(on_progress, "recording inputs for the quiet loss")
            self.quiet_loss = QuietLoss(pipe, config, adapter, targets, captions, data.resolution, stacks, progress)
        groups = setup.parameter_groups(pipe, adapter, config, targets)
        optimizer = build_optimizer(config, groups)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # the scheduler computes this step's rate from it
        self.scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps, last_epoch=self.resumed - 1,
        )  # fmt: skip
        self.optimizer: Any = accelerator.prepare(optimizer)
        self.scaler: Any = accelerator.scaler  # of gradients, in fp16; else None
        trained = {id(p) for group in groups for p in group["params"]}
        self.parameters = {name: p for name, p in setup.named_parameters(adapter).items() if id(p) in trained}
        trains_text = bool(config.token_lr) or any(component_of(name) != "unet" for name in targets)
        gradients = BatchGradients(pipe, config, data, accelerator, stacks, self.quiet_loss, trains_text=trains_text)
        self.gradients: BatchGradients | CapturedGradients = gradients
        if config.cuda_graphs and can_capture(pipe.device):
            self.gradients = CapturedGradients(gradients, list(self.parameters.values()), pipe.device)
        self._check_room()
        if checkpoint:
            checkpoint.restore(self.parameters, optimizer, self.scaler)
            logger.info("Resuming from '%s' after %d steps.", checkpoint.path, self.resumed)

    def steps(self) -> Generator[TrainStep]:
        self.began = time.monotonic()
        try:
            # Resumed after the last step: nothing is left to train, but the adapter may never have been saved.
            for step in range(self.resumed + 1, self.config.max_train_steps + 1) or [self.resumed]:
                yield self._step(step)
        except (Exception, KeyboardInterrupt):
            self._save_checkpoint()
            raise

    def _step(self, step: int) -> TrainStep:
        config, trained = self.config, step > self.resumed
        if trained:
            self._optimize(step)
        # Prodigy multiplies the rate by what it finds.
        rate = float(self.scheduler.get_last_lr()[0]) * self.optimizer.param_groups[0].get("d", 1.0)
        if config.report_to and trained:
            self.accelerator.log({"loss": self.last_loss, "learning_rate": rate}, step=step)
        provenance = replace(self.adapter.info.provenance, steps=step)
        self.adapter = replace(self.adapter, info=replace(self.adapter.info, provenance=provenance))
        checkpoint = self._save_checkpoint() if self.checkpoints.due(step) else None
        images = self._previews(step)
        took = time.monotonic() - self.began
        loss, total = self.last_loss, config.max_train_steps
        return TrainStep(step, total, loss, rate, self.adapter, took, images, checkpoint, self.resumed)

    def _optimize(self, step: int) -> None:
        """One optimizer step. In fp16, gradients that overflow are computed again, scaled less.

        The repetition does not count as a step: it has the same pictures, noise and learning rate.
        """
        while True:
            loss = self._gradients(step)
            self.done = 0  # in between, the parameters have no step's state
            self.optimizer.step()
            if not self.optimizer.step_was_skipped:
                self.scheduler.step()
                self.done, self.last_loss = step, loss
                return
            self.done = step - 1
            if self.scaler.get_scale() < MIN_SCALE:
                raise FusionError(
                    f"The gradients overflow in float16 at step {step}, however small they are scaled; train with "
                    "mixed_precision = 'bf16' or 'no', or at a lower learning rate."
                )

    def _gradients(self, step: int) -> float:
        """The gradients of all micro-batches of a step, clipped; returns the mean loss."""
        config, count = self.config, self.config.gradient_accumulation_steps
        self.optimizer.zero_grad(set_to_none=True)
        losses = [
            self.gradients.add(self.gradients.inputs((step - 1) * count + batch), last=batch == count - 1)
            for batch in range(count)
        ]
        total = float(torch.stack(losses).sum())
        if not math.isfinite(total):
            raise FusionError(
                f"The loss is {total} at step {step}; the learning rate ({config.learning_rate:g}) is probably too "
                "high for this base. The last checkpoint, if any, is untouched."
            )
        if config.max_grad_norm:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.max_grad_norm)
        return total

    def _previews(self, step: int) -> list[Image.Image]:
        """Pictures of the validation prompts, every `validation_steps` and of the finished adapter."""
        config = self.config
        due = not step % config.validation_steps or step == config.max_train_steps
        if not (due and config.num_validation_images):
            return []
        count, skip, prompts = config.num_validation_images, config.clip_skip or 0, config.validation_prompts()
        drawings = [
            GenerationConfig(prompt=prompt, seed=config.seed, num_images=count, clip_skip=skip) for prompt in prompts
        ]

        self.gradients.release()  # drawing needs the memory

        def report(number: int, done: int, total: int, _: object) -> None:
            if self.on_progress:
                self.on_progress("drawing previews", number * total + done, len(drawings) * total)

        try:
            return [
                picture.image
                for number, drawing in enumerate(drawings)
                for picture in generate(self.pipe, drawing, on_step=partial(report, number))
            ]
        except KeyboardInterrupt:  # of a finished training, the adapter must not be lost with its previews
            if step < config.max_train_steps:
                raise
            return []

    def _save_checkpoint(self) -> Path | None:
        """A checkpoint of the last whole step, unless there is one, and beside it the encoded pictures."""
        checkpoint = self.checkpoints.save(
            self.parameters, self.optimizer, self.scaler,
            step=self.done, loss=self.last_loss, settings=self.adapter.info.provenance.settings,
        )  # fmt: skip
        if checkpoint:
            self.data.write(checkpoint.parent)
        return checkpoint

    def _check_room(self) -> None:
        """Raise OutputError if the disk has no room for the checkpoints to come: the adapter and its moments each."""
        config, every = self.config, self.config.checkpointing_steps
        if every:
            count = (config.max_train_steps - self.resumed) // every + 1  # and the one of an interruption
            count = min(count, (config.checkpoints_total_limit or count) + 1)
            copies = 5 if config.optimizer == "prodigy" else 3
            size = copies * 4 * sum(parameter.numel() for parameter in self.parameters.values())
            check_output(self.checkpoints.folder / "checkpoint", folder=True, size=count * size)
