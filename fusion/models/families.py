"""The families of Stable Diffusion, recognised from the pipeline's own structure."""

from pathlib import Path
from typing import Any

from torch import nn

from fusion.adapters.adapter import BaseInfo
from fusion.errors import BaseMismatch
from fusion.models.names import Pipeline, components

FAMILIES = ("sd1", "sd2", "sdxl")


def family(pipe: Pipeline) -> str:
    """One of FAMILIES. Raises BaseMismatch for a pipeline that is none of them.

    XL is the one with two text encoders and added time ids; 2.x projects into its transformers by linear layers where
    1.x uses 1x1 convolutions. Widths, vocabulary and resolution are never asked.
    """
    parts = components(pipe)
    if "unet" not in parts or len(parts) < 2:
        raise BaseMismatch(
            f"{type(pipe).__name__} has no UNet with a CLIP text encoder; "
            "spectral-fusion works on Stable Diffusion 1.x, 2.x and XL."
        )
    config = model_config(parts["unet"])
    if "text_encoder_2" in parts or config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def base_info(pipe: Any) -> BaseInfo:
    """What an adapter trained on this pipeline says of its base."""
    where = pipe.config.get("_name_or_path") or getattr(model_of(pipe), "name_or_path", "") or "unnamed"
    return BaseInfo(family(pipe), Path(str(where)).name, str(pipe.scheduler.config.prediction_type))


def model_of(pipe: Pipeline) -> nn.Module:
    """The UNet without torch.compile's wrapper."""
    return getattr(pipe.unet, "_orig_mod", pipe.unet)


def model_config(module: nn.Module) -> dict[str, Any]:
    inner: Any = getattr(module, "_orig_mod", module)
    return dict(inner.config)
