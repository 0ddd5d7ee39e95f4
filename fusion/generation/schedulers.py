"""Schedulers by the names people know, made anew for every picture, for drawing changes them."""

import inspect
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin

from fusion.errors import ConfigError, UnknownName, closest
from fusion.models.noise_schedule import check_noise
from fusion.models.pipeline import Pipeline

# With what makes each of them; everything else comes from the base's own.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),  # Hyper-SD
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # SDXL Lightning, Turbo
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}


@contextmanager
def own_scheduler(pipe: Pipeline, name: str | None) -> Generator[None]:
    """A scheduler for this call alone: set_timesteps changes it, and the user's must not move."""
    original = pipe.scheduler
    pipe.scheduler = make_scheduler(original, name)
    try:
        yield
    finally:
        pipe.scheduler = original


def make_scheduler(original: ConfigMixin, name: str | None) -> Any:
    """A fresh scheduler called `name` for the base whose own is `original`; None: a fresh one of the same class.

    Raises UnknownName, ConfigError for one that cannot follow the base's noise schedule, BaseMismatch where only the
    base's own can, or none.
    """
    if name is not None or not hasattr(original, "init_noise_sigma"):  # Stable Diffusion's pipelines need that
        check_noise(original)
    if name is None:
        return type(original).from_config(original.config)
    if name not in SCHEDULERS:
        plain = re.sub(r"[\s-]+", "_", name.lower().replace("++", "pp"))  # as A1111 writes them: DPM++ 2M Karras
        raise UnknownName(
            f"No scheduler is called '{name}'{closest(plain, SCHEDULERS)} There are: {', '.join(SCHEDULERS)}."
        )
    class_name, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name)
    zero_snr = original.config.get("rescale_betas_zero_snr", False)
    if zero_snr and "rescale_betas_zero_snr" not in inspect.signature(scheduler.__init__).parameters:
        capable = [
            n
            for n, (c, _) in SCHEDULERS.items()
            if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, c)).parameters
        ]
        raise ConfigError(
            f"Scheduler '{name}' cannot do this base's zero-terminal-SNR noise; use {', '.join(capable)}."
        )
    if class_name == "PNDMScheduler" and original.config.get("prediction_type") == "sample":
        raise ConfigError(f"Scheduler '{name}' cannot draw on this base, which predicts the sample; use ddim or euler.")
    known: Mapping[str, Any] = inspect.signature(scheduler.__init__).parameters
    return scheduler.from_config({k: v for k, v in original.config.items() if k in known} | settings)
