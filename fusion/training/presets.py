"""How thoroughly to learn, in three words. Everything else stays as the base and the user say."""

from collections.abc import Mapping
from typing import Any

from fusion.errors import UnknownName, closest
from fusion.training.config import TrainingConfig

# Of the number of steps that suits the base: a first look, what is known to work, and for difficult things.
PRESETS = {"quick": 0.4, "standard": 1.0, "careful": 2.0}


def preset(name: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings a preset stands for on a base whose own `fusion.toml` says `base`. Raises UnknownName."""
    if name not in PRESETS:
        raise UnknownName(f"No preset is called '{name}'{closest(name, PRESETS)} There are: {', '.join(PRESETS)}.")
    usual = base.get("max_train_steps", TrainingConfig.model_fields["max_train_steps"].default)
    return {"max_train_steps": max(1, round(usual * PRESETS[name]))}
