"""The noise of Stable Diffusion: betas, by which DDPM's forward process is known for training and measuring."""

from typing import Any

from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin

from fusion.errors import BaseMismatch
from fusion.models.pipeline import Pipeline


def forward_process(pipe: Pipeline, **settings: object) -> Any:
    """The forward process of a base, a DDPMScheduler; `settings` other than those of its scheduler.

    Raises BaseMismatch for other kinds of noise.
    """
    check_noise(pipe.scheduler)
    # As keywords: in a table, those that the scheduler's own config leaves at their defaults would be lost.
    return DDPMScheduler.from_config(pipe.scheduler.config, False, **settings)


def check_noise(scheduler: ConfigMixin) -> None:
    """Raise BaseMismatch for the scheduler of a base that knows no betas: EDM (Playground 2.5), flow matching."""
    name = type(scheduler).__name__
    if "FlowMatch" in name or scheduler.config.get("prediction_type") == "flow_prediction":
        kind = "flow matching"
    elif "EDM" in name or "sigma_data" in scheduler.config:
        kind = "EDM noise"
    elif "beta_start" in scheduler.config or scheduler.config.get("trained_betas") is not None:
        return
    else:
        kind = "a noise of its own"
    raise BaseMismatch(
        f"This base has {kind} ({name}), not Stable Diffusion's: adapters cannot be trained or measured on it, and the "
        "schedulers of Stable Diffusion cannot draw with it."
    )
