"""The Accelerator and the frozen base of a training; afterwards everything is as it was before."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from torch.utils.checkpoint import checkpoint

from fusion.errors import ConfigError
from fusion.models.devices import PRECISIONS
from fusion.models.layer_sites import components
from fusion.models.pipeline import Pipeline
from fusion.training.config import TrainingConfig

# Nothing is random in these models; and a step that is captured cannot read the state of random numbers.
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}


def check_tracker(config: TrainingConfig) -> None:
    """Raise ConfigError where a tracker's package is missing: accelerate would log nothing, and say nothing."""
    if config.report_to and config.report_to not in [str(tracker) for tracker in get_available_trackers()]:
        raise ConfigError(
            f"report_to = '{config.report_to}' would log nothing, as its package is not installed; install "
            f"{config.report_to}, or leave report_to out."
        )


def precision(pipe: Pipeline, config: TrainingConfig) -> str:
    """The precision to train in, "no", "fp16" or "bf16". Raises ConfigError for a float16 base without a scaler."""
    stored: torch.dtype = pipe.unet.dtype
    chosen = PRECISIONS.get(stored, "no") if config.mixed_precision == "auto" else config.mixed_precision
    if stored == torch.float16 and (chosen != "fp16" or pipe.device.type == "cpu"):
        raise ConfigError(
            f"The base is loaded in float16, in which a gradient overflows without a scaler, which mixed_precision = "
            f"'{chosen}' on {pipe.device.type} has not; load it in float32 or bfloat16."
        )
    return chosen


@contextmanager
def accelerated(pipe: Pipeline, config: TrainingConfig) -> Generator[Accelerator]:
    """An Accelerator on the pipeline's device; its process-wide state is cleared so that the next may differ."""
    on_cpu = pipe.device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=on_cpu)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=config.output_dir / "logs",
    )
    if accelerator.num_processes > 1:
        raise ConfigError("A training runs in one process; start it without a launcher of several.")
    # Accelerate takes the first GPU, whichever the base is on; its state has no declared attributes.
    setattr(accelerator.state, "device", pipe.device)  # noqa: B010
    if config.report_to:
        # Trackers take flat values only.
        flat = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.lasting_settings().items()}
        try:
            accelerator.init_trackers(config.name, config=flat)
        except Exception as error:  # each tracker has its own; most often nobody is logged in
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ConfigError(f"report_to = '{config.report_to}' cannot log: {reason}") from error
    try:
        yield accelerator
    finally:
        if config.report_to:
            accelerator.end_training()
        accelerator.free_memory()
        AcceleratorState._reset_state()


@contextmanager
def frozen(pipe: Pipeline, config: TrainingConfig) -> Generator[None]:
    """Freeze the base for the training, and restore every flag afterwards."""
    models: list[Any] = [*components(pipe).values(), pipe.vae]
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
    modes = [(module, module.training) for model in models for module in model.modules()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    checkpointed: list[Any] = list(components(pipe).values()) if config.gradient_checkpointing else []
    for model in checkpointed:
        if hasattr(model, "enable_gradient_checkpointing"):  # of diffusers, else of transformers
            model.enable_gradient_checkpointing(partial(checkpoint, **CHECKPOINTING))
        else:
            model.activation_checkpointing_enable(CHECKPOINTING)
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
