"""train(): pictures of a concept become an adapter, as a generator of steps.

The progress bar of the command line, the app and the tests are three consumers of it. Stop asking for steps (close the
generator) and the pipeline is as it was found.
"""

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn

from fusion.adapters.adapter import Adapter
from fusion.errors import FusionError
from fusion.generation.drawing import generate
from fusion.layer_names import component_of, sees_tokens
from fusion.models.attachment import attach
from fusion.models.denoising import Conditioning, encode_prompts, predict
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_defaults
from fusion.training.accelerator import accelerated, frozen
from fusion.training.batches import Batches
from fusion.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    slice_of_checkpoint,
)
from fusion.training.config import TrainingConfig
from fusion.training.loss import denoising_loss, denoising_target, sample_noise, sample_timesteps, snr_weights
from fusion.training.quiet_loss import Quiet
from fusion.training.setup import fresh_adapter, parameter_groups

logger = logging.getLogger(__name__)

# Settings under which a resumed training would not be the same training.
LASTING = (
    "seed", "adapter_type", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "text_encoder_lr", "token_lr", "balance_slices",
    "quiet_loss_weight",
)  # fmt: skip


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
    checkpoint: Path | None = None


def train(pipe: Pipeline, config: TrainingConfig) -> Generator[TrainStep]:
    """Teach one concept to an adapter; the pipeline's own weights are never changed.

    Settings left open come from the base's `fusion.toml`. Everything is checked before the first step: pictures,
    targets, slice (reserved in the library for as long as training lasts), checkpoint.
    Raises DatasetError, ConfigError, SliceConflict, UnknownName; FusionError when the loss is no number any more.
    """
    config = config.with_base_defaults(base_defaults(pipe, "training"))
    with ExitStack() as held:
        run = _Training(pipe, config, held)
        yield from run.steps()


class _Training:
    """The state of one training; everything it touches is put back when `held` closes."""

    def __init__(self, pipe: Pipeline, config: TrainingConfig, held: ExitStack) -> None:
        self.pipe, self.config = pipe, config
        self.batches = Batches(pipe, config)
        self.accelerator = held.enter_context(accelerated(pipe, config))
        held.enter_context(frozen(pipe, config))
        self.checkpoints = config.output_dir / "checkpoints" / config.name
        asked = config.resume_from_checkpoint
        self.resumed = find_checkpoint(asked, self.checkpoints) if asked else None
        self.adapter = fresh_adapter(pipe, config, held, self.resumed and slice_of_checkpoint(self.resumed))
        self._tell_about_gates()
        held.enter_context(attach(pipe, self.adapter, live=True))
        self.batches.prepare()
        captions = [example.caption for example in self.batches.instances.examples]
        self.quiet = Quiet(pipe, config, self.adapter, captions) if config.quiet_loss_weight else None
        groups = parameter_groups(pipe, self.adapter, config)
        optimizer = torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
        warm_up, total = config.lr_warmup_steps, config.max_train_steps
        self.scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=warm_up, num_training_steps=total
        )
        self.optimizer: Any = self.accelerator.prepare(optimizer)
        self.noise = _noise_schedule(pipe, config)
        trained = {id(p) for group in groups for p in group["params"]}
        self.parameters = {name: p for name, p in named_parameters(self.adapter).items() if id(p) in trained}
        self.trains_text = bool(config.token_lr) or any(component_of(n) != "unet" for n in self.adapter.layer_names)
        self.text_cache: dict[str, Conditioning] = {}
        self.done = self._resume()

    def steps(self) -> Generator[TrainStep]:
        config, began = self.config, time.monotonic()
        for step in range(self.done + 1, config.max_train_steps + 1):
            loss = self._optimize(step)
            rate = float(self.scheduler.get_last_lr()[0])
            if config.report_to:
                self.accelerator.log({"loss": loss, "learning_rate": rate}, step=step)
            provenance = replace(self.adapter.info.provenance, steps=step)
            self.adapter = replace(self.adapter, info=replace(self.adapter.info, provenance=provenance))
            seconds, images, checkpoint = time.monotonic() - began, self._previews(step), self._checkpoint(step)
            yield TrainStep(step, config.max_train_steps, loss, rate, self.adapter, seconds, images, checkpoint)

    def _optimize(self, step: int) -> float:
        """One optimizer step over all micro-batches; returns the mean loss."""
        config, total = self.config, 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(config.gradient_accumulation_steps):
            number = (step - 1) * config.gradient_accumulation_steps + micro
            with self.accelerator.autocast():
                loss = self._loss(number) / config.gradient_accumulation_steps
            self.accelerator.backward(loss)
            total += float(loss.detach())
        if self.quiet is not None:
            self.accelerator.backward(self.quiet.loss(self.adapter))
        if not math.isfinite(total):
            raise FusionError(
                f"The loss is {total} at step {step}; the learning rate ({config.learning_rate:g}) is probably too "
                "high for this base. The last checkpoint, if any, is untouched."
            )
        if config.max_grad_norm:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        return total

    def _loss(self, number: int) -> Tensor:
        """The loss of micro-batch `number`: a function of the seed and that number alone."""
        config, device = self.config, self.accelerator.device
        generator = _generator(config.seed, number)
        latents, mask, time_ids, captions, weights = self.batches.batch(number, generator)
        noise = sample_noise(latents.shape, config.noise_offset, generator).to(device)
        steps = sample_timesteps(len(latents), self.noise.config.num_train_timesteps, generator).to(device)
        noisy = self.noise.add_noise(latents, noise, steps)
        prediction = predict(self.pipe, noisy, steps, self._encode(captions), time_ids)
        if config.snr_gamma:
            weights = weights * snr_weights(self.noise, steps, config.snr_gamma)
        return denoising_loss(
            prediction, denoising_target(self.noise, latents, noise, steps), weights=weights, mask=mask
        )

    def _encode(self, captions: list[str]) -> Conditioning:
        """Encoded captions; once per caption where nothing in the text encoder is trained."""
        if self.trains_text:
            return encode_prompts(self.pipe, captions)
        with torch.no_grad():
            for caption in captions:
                if caption not in self.text_cache:
                    self.text_cache[caption] = encode_prompts(self.pipe, [caption])
        return Conditioning.join([self.text_cache[caption] for caption in captions])

    def _previews(self, step: int) -> list[Image.Image]:
        """Pictures of the validation prompts, every `validation_steps` and of the finished adapter."""
        config = self.config
        if step % config.validation_steps and step != config.max_train_steps:
            return []
        drawn = [
            generate(self.pipe, prompt, seed=config.seed, batch=config.num_validation_images)
            for prompt in config.validation_prompts()
        ]
        return [picture.image for pictures in drawn for picture in pictures]

    def _checkpoint(self, step: int) -> Path | None:
        """Every `checkpointing_steps`, keeping the newest `checkpoints_total_limit`."""
        if not self.config.checkpointing_steps or step % self.config.checkpointing_steps:
            return None
        path = self.checkpoints / f"checkpoint-{step}"
        save_checkpoint(path, self.parameters, self.optimizer, self.scheduler, self._lasting())
        if limit := self.config.checkpoints_total_limit:
            for old in checkpoints(self.checkpoints)[:-limit]:
                shutil.rmtree(old)
        return path

    def _resume(self) -> int:
        """The number of steps done already."""
        if self.resumed is None:
            return 0
        load_checkpoint(self.resumed, self.parameters, self.optimizer, self.scheduler, self._lasting())
        done = int(self.scheduler.last_epoch)
        logger.info("Resuming from '%s' after %d steps.", self.resumed, done)
        return done

    def _lasting(self) -> dict[str, Any]:
        owned = {"slices": [part.to_json() for part in self.adapter.slices]}
        return {"examples": self.batches.digest} | owned | {name: getattr(self.config, name) for name in LASTING}

    def _tell_about_gates(self) -> None:
        config, names = self.config, self.adapter.layer_names
        if config.gating != "tokens":
            return
        if blind := [name for name in names if not sees_tokens(name)]:
            logger.warning(
                "%d of %d targeted layers see no tokens (%s, …); there %s acts on whole pictures whose prompt holds "
                "it, so concepts drawn together will mix.", len(blind), len(names), blind[0], config.token,
            )  # fmt: skip
        if config.with_prior_preservation:
            logger.warning(
                "Prior preservation changes nothing here: under token gating, class prompts run the base itself. "
                "Drop with_prior_preservation, or train with gating = 'none'."
            )


def named_parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Everything trainable under a stable name: `<layer>.<tensor>` and `<component>.token.<token>`."""
    found = {f"{name}.{key}": p for name, layer in adapter.layers.items() for key, p in layer.named_parameters()}
    for token, rows in adapter.tokens.items():
        found |= {f"{c}.token.{token}": row for c, row in rows.items() if isinstance(row, nn.Parameter)}
    return found


def _generator(seed: int, number: int) -> torch.Generator:
    name = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(name[:7], "big"))


def _noise_schedule(pipe: Pipeline, config: TrainingConfig) -> Any:
    """The base's own forward process, for adding noise."""
    schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    if config.prediction_type:
        schedule.register_to_config(prediction_type=config.prediction_type)
    return schedule
