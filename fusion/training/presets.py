"""Presets for the number of training steps. Everything else stays as the base and the user set it."""

from collections.abc import Mapping
from typing import Any

from fusion.errors import UnknownName, closest
from fusion.training.config import TrainingConfig

# Times the number of steps that suits the base.
PRESETS = {"quick": 0.4, "standard": 1.0, "careful": 2.0}


def preset(name: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset, where `base` is [training] of the base's `fusion.toml`. Raises UnknownName,
    ConfigError for a table that is wrong.
    """
    if name not in PRESETS:
        raise UnknownName(f"No preset is called '{name}'{closest(name, PRESETS)} There are: {', '.join(PRESETS)}.")
    usual = TrainingConfig.from_values({"token": "<a>", "instance_data_dir": "."}).with_base_defaults(base)
    return {"max_train_steps": max(1, round(usual.max_train_steps * PRESETS[name]))}
