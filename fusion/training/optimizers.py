"""The optimizers of trainings, by their names in the settings."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from fusion.errors import ConfigError
from fusion.training.config import TrainingConfig

PACKAGES = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}  # what is no dependency


def check_optimizer(config: TrainingConfig) -> None:
    """Raise ConfigError where the optimizer's package is missing."""
    package = PACKAGES.get(config.optimizer)
    if package and find_spec(package) is None:
        raise ConfigError(
            f"optimizer = '{config.optimizer}' needs a package that is not installed; run: pip install {package}"
        )


def build_optimizer(config: TrainingConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer of the settings for parameter groups with their learning rates and weight decays."""
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "prodigy":  # with what its authors advise for diffusion models
        prodigy: Any = import_module("prodigyopt").Prodigy
        return prodigy(groups, **options, use_bias_correction=True, safeguard_warmup=True)
    if config.optimizer == "adafactor":  # at the learning rate that is set; a fresh adapter is zero, which has no scale
        return Adafactor(groups, scale_parameter=False, relative_step=False)
    if config.optimizer == "adamw8bit":
        return import_module("bitsandbytes").optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options)
