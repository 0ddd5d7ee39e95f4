"""train(): pictures of a concept become an adapter, as a generator of steps.

The progress bar of the command line, the app and the tests are three consumers of it. Stop asking for steps (close the
generator) and the pipeline is as it was found.
"""

import hashlib
import logging
import math
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn

from fusion.adapters.adapter import Adapter
from fusion.errors import ConfigError, FusionError
from fusion.generation import generate
from fusion.models.bases import base_defaults
from fusion.models.conditioning import Conditioning, encode_prompts, predict
from fusion.models.injection import attach
from fusion.models.names import component_of, components
from fusion.training.batches import Batches
from fusion.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from fusion.training.config import TrainingConfig
from fusion.training.loss import denoising_loss, denoising_target, sample_noise, sample_timesteps, snr_weights
from fusion.training.preparation import fresh_adapter, parameter_groups, tokenless

logger = logging.getLogger(__name__)


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


def train(pipe: Any, config: TrainingConfig) -> Generator[TrainStep]:
    """Teach one concept to an adapter; the pipeline's own weights are never changed.

    Settings left open come from the base's `fusion.toml`. Everything is checked before the first step: pictures,
    targets, slice (reserved in the library for as long as training lasts), checkpoint.
    Raises DatasetError, ConfigError, SliceConflict, UnknownName; FusionError when the loss is no number any more.
    """
    config = config.with_base_defaults(base_defaults(pipe, "training"))
    with ExitStack() as held:
        run = _Run(pipe, config, held)
        yield from run.steps()


class _Run:
    """The state of one training; everything it touches is put back when `held` closes."""

    def __init__(self, pipe: Any, config: TrainingConfig, held: ExitStack) -> None:
        self.pipe, self.config = pipe, config
        _check_precision(pipe, config)
        self.batches = Batches(pipe, config)
        self.accelerator = held.enter_context(_accelerator(pipe, config))
        held.enter_context(_frozen(pipe, config))
        self.adapter = fresh_adapter(pipe, config, held)
        self._tell_about_gates()
        held.enter_context(attach(pipe, self.adapter, live=True))
        self.batches.prepare()
        groups = parameter_groups(pipe, self.adapter, config)
        optimizer = torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
        )
        self.optimizer: Any = self.accelerator.prepare(optimizer)
        self.noise = _noise_schedule(pipe, config)
        trained = {id(p) for group in groups for p in group["params"]}
        self.parameters = {name: p for name, p in named_parameters(self.adapter).items() if id(p) in trained}
        self.trains_text = bool(config.token_lr) or any(component_of(n) != "unet" for n in self.adapter.layer_names)
        self.text_cache: dict[str, Conditioning] = {}
        self._checkpoints = config.output_dir / "checkpoints" / config.name
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
            yield TrainStep(
                step,
                config.max_train_steps,
                loss,
                rate,
                self.adapter,
                time.monotonic() - began,
                images=self._previews() if self._looks(step) else [],
                checkpoint=self._checkpoint(step) if _due(step, config.checkpointing_steps) else None,
            )

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
        if not math.isfinite(total):
            raise FusionError(
                f"The loss is {total} at step {step}; the learning rate ({config.learning_rate:g}) is probably too "
                "high for this base. The last checkpoint, if any, is untouched."
            )
        self._average_over_processes()
        if config.max_grad_norm:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        return total

    def _loss(self, number: int) -> Tensor:
        """The loss of micro-batch `number`: a function of the seed and that number alone."""
        config, device = self.config, self.accelerator.device
        # Processes take different batches of one order.
        number = number * self.accelerator.num_processes + self.accelerator.process_index
        generator = _generator(config.seed, number)
        batch = self.batches.instance(number, generator)
        prior = self.batches.prior(number, generator)
        latents = torch.cat([batch.latents, prior.latents]) if prior else batch.latents
        count = len(latents)
        noise = sample_noise(latents.shape, config.noise_offset, generator).to(device)
        steps = sample_timesteps(count, self.noise.config.num_train_timesteps, generator).to(device)
        captions = [*batch.captions, *(prior.captions if prior else [])]
        time_ids = [*batch.time_ids, *(prior.time_ids if prior else [])]
        noisy = self.noise.add_noise(latents, noise, steps)
        prediction = predict(self.pipe, noisy, steps, self._encode(captions), time_ids)
        target = denoising_target(self.noise, latents, noise, steps)
        weights = snr_weights(self.noise, steps, config.snr_gamma) if config.snr_gamma else None
        own = len(batch.latents)
        loss = denoising_loss(
            prediction[:own],
            target[:own],
            weights=None if weights is None else weights[:own],
            mask=batch.mask,
        )
        if prior:
            rest = None if weights is None else weights[own:]
            loss = loss + config.prior_loss_weight * denoising_loss(prediction[own:], target[own:], weights=rest)
        return loss

    def _encode(self, captions: list[str]) -> Conditioning:
        """Encoded captions; once per caption where nothing in the text encoder is trained."""
        if self.trains_text:
            return encode_prompts(self.pipe, captions)
        with torch.no_grad():
            for caption in captions:
                if caption not in self.text_cache:
                    self.text_cache[caption] = encode_prompts(self.pipe, [caption])
        return Conditioning.join([self.text_cache[caption] for caption in captions])

    def _average_over_processes(self) -> None:
        """Gradients are a few megabytes: averaged directly, without wrapping the frozen models for it."""
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    mean: Any = self.accelerator.reduce(parameter.grad, reduction="mean")
                    parameter.grad = mean

    def _looks(self, step: int) -> bool:
        """Previews are drawn every `validation_steps`, and of the finished adapter."""
        return _due(step, self.config.validation_steps) or step == self.config.max_train_steps

    def _previews(self) -> list[Image.Image]:
        """Pictures of the validation prompts, by the code that draws all pictures."""
        return [
            picture.image
            for prompt in self.config.validation_prompts()
            for picture in generate(self.pipe, prompt, seed=self.config.seed, batch=self.config.num_validation_images)
        ]

    def _checkpoint(self, step: int) -> Path | None:
        if not self.accelerator.is_main_process:
            return None
        return save_checkpoint(
            self._checkpoints,
            step,
            self.parameters,
            getattr(self.optimizer, "optimizer", self.optimizer),
            self.scheduler,
            self._unchangeable(),
            limit=self.config.checkpoints_total_limit,
        )

    def _resume(self) -> int:
        if self.config.resume_from_checkpoint is None:
            return 0
        path = find_checkpoint(self.config.resume_from_checkpoint, self._checkpoints)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        done = load_checkpoint(path, self.parameters, optimizer, self.scheduler, self._unchangeable())
        logger.info("Resuming from '%s' after %d steps.", path, done)
        return done

    def _unchangeable(self) -> Mapping[str, Any]:
        """Settings under which a resumed training would not be the same training."""
        config = self.config
        return {
            "seed": config.seed,
            "adapter_type": config.adapter_type,
            "max_train_steps": config.max_train_steps,
            "train_batch_size": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "examples": self.batches.digest,
        }

    def _tell_about_gates(self) -> None:
        config = self.config
        if config.gating != "tokens":
            return
        if blind := tokenless(self.adapter.layer_names):
            logger.warning(
                "%d of %d targeted layers see no tokens (%s, …); there %s acts on whole pictures whose prompt holds "
                "it, so concepts drawn together will mix.",
                len(blind), len(self.adapter.layer_names), blind[0], config.token,
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


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def _generator(seed: int, number: int) -> torch.Generator:
    name = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(name[:7], "big"))


def _noise_schedule(pipe: Any, config: TrainingConfig) -> Any:
    """The base's own forward process, for adding noise."""
    schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    if config.prediction_type:
        schedule.register_to_config(prediction_type=config.prediction_type)
    return schedule


def _check_precision(pipe: Any, config: TrainingConfig) -> None:
    dtype = next(pipe.unet.parameters()).dtype
    if dtype == torch.float16 and config.mixed_precision != "fp16":
        raise ConfigError("The base is loaded in float16; train with mixed_precision = 'fp16', or load it in float32.")


@contextmanager
def _accelerator(pipe: Any, config: TrainingConfig) -> Generator[Accelerator]:
    """An Accelerator on the pipeline's device; its process-wide state is cleared so that the next may differ."""
    AcceleratorState._reset_state(reset_partial_state=pipe.device.type == "cpu")
    accelerator = Accelerator(
        cpu=pipe.device.type == "cpu",
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.logging_folder(),
    )
    if accelerator.device != pipe.device:
        pipe.to(accelerator.device)
    if config.report_to:
        # Trackers take flat values only.
        flat = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.lasting_settings().items()}
        accelerator.init_trackers(config.name, config=flat)
    try:
        yield accelerator
    finally:
        if config.report_to:
            accelerator.end_training()
        accelerator.free_memory()
        AcceleratorState._reset_state()


@contextmanager
def _frozen(pipe: Any, config: TrainingConfig) -> Generator[None]:
    """Freeze the base for the training, and give back every flag as it was."""
    models: list[Any] = [*components(pipe).values(), pipe.vae]
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
    modes = [(module, module.training) for model in models for module in model.modules()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    checkpointed: list[Any] = list(components(pipe).values()) if config.gradient_checkpointing else []
    for model in checkpointed:
        enable = getattr(model, "enable_gradient_checkpointing", None) or model.activation_checkpointing_enable
        enable()
        model.train()  # transformers recomputes only in training mode; these models have no dropout
    try:
        yield
    finally:
        for model in checkpointed:
            disable = getattr(model, "disable_gradient_checkpointing", None) or model.activation_checkpointing_disable
            disable()
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
