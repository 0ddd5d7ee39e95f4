"""Pipelines of base models: their devices, families and the defaults they come with."""

import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fusion.adapters.adapter import BaseInfo
from fusion.config import read_base_defaults
from fusion.errors import BaseMismatch
from fusion.models.layer_sites import components, sites
from fusion.models.pipeline import Pipeline, config_of, uncompiled

FAMILIES = ("sd1", "sd2", "sdxl")
_SAMPLE = 2**16  # weights of each layer that are digested


@contextmanager
def silent_loading() -> Generator[None]:
    """Without the advice and the loading bars of diffusers and transformers, unless DIFFUSERS_VERBOSITY asks for them.

    Errors and the bars of downloads are shown all the same.
    """
    import diffusers.utils.logging as diffusers_log
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers_log

    logs = (diffusers_log, transformers_log) if os.environ.get("DIFFUSERS_VERBOSITY", "error") == "error" else ()
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    downloads = not hub.are_progress_bars_disabled()
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    if logs and downloads:
        hub.enable_progress_bars()  # transformers has disabled those of the hub with its own
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def base_defaults(pipe: Pipeline, table: str) -> dict[str, Any]:
    """What the base's own `fusion.toml` says in a table, such as "training" or "generation"; empty without one."""
    return read_base_defaults(pipe.config.get("_name_or_path"), table)


def family(pipe: Pipeline) -> str:
    """One of FAMILIES. Raises BaseMismatch for a pipeline that is none of them.

    XL is the one with two text encoders and added time ids; 2.x projects into its transformers by linear layers where
    1.x uses 1x1 convolutions. Widths, vocabulary and resolution do not matter.
    """
    parts = components(pipe)
    if "unet" not in parts or len(parts) < 2:
        raise BaseMismatch(
            f"{type(pipe).__name__} has no UNet with a CLIP text encoder; "
            "spectral-fusion works on Stable Diffusion 1.x, 2.x and XL."
        )
    config = config_of(parts["unet"])
    if "text_encoder_2" in parts or config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def base_name(pipe: Pipeline) -> str:
    """The last part of the base's folder or hub id, or the name of its single file without the ending."""
    where = pipe.config.get("_name_or_path") or getattr(uncompiled(pipe.unet), "name_or_path", "") or "unnamed"
    return Path(str(where)).name.removesuffix(".safetensors")


def base_info(pipe: Pipeline) -> BaseInfo:
    """What an adapter trained on this pipeline says of its base."""
    prediction = pipe.scheduler.config.get("prediction_type", "")  # schedulers of flow matching have none
    return BaseInfo(family(pipe), base_name(pipe), str(prediction), _digest(pipe))


def _digest(pipe: Pipeline) -> str:
    """SHA-256 over the signs of the first weights of every adaptable layer, 16 hexadecimal digits.

    Rounding to any precision keeps signs; a finetune flips some of those near zero. Empty where weights are no plain
    tensors, or not in memory.
    """
    sha = hashlib.sha256()
    for name, site in sorted(sites(pipe).items()):
        weight: Any = site.module.weight
        if weight.is_meta or not weight.is_floating_point() or type(weight) not in (torch.Tensor, nn.Parameter):
            return ""
        negative = weight.detach().flatten()[:_SAMPLE].float().signbit()
        sha.update(name.encode() + np.packbits(negative.cpu().numpy()).tobytes())
    return sha.hexdigest()[:16]
