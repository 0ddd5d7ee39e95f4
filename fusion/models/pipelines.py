"""Pipelines of base models: opened safely, their families and the defaults they come with."""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fusion.adapters.adapter import BaseInfo
from fusion.config import read_base_defaults
from fusion.errors import BaseMismatch
from fusion.models.devices import as_device, as_dtype
from fusion.models.embedded_models import pocket
from fusion.models.layer_sites import components
from fusion.models.pipeline import Pipeline, config_of, uncompiled

FAMILIES = ("sd1", "sd2", "sdxl")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def open_pipeline(
    base: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """A Stable Diffusion pipeline from a folder or hub id, `pocket` by default, ready on `device`.

    Weights in safetensors only and no code from the model's repository. Device: CUDA, else Apple's GPU, else CPU.
    dtype, one for all components: on a GPU bfloat16 where the card computes in it, else float16; on a CPU float32, or
    bfloat16 where that would not fit. Raises BaseMismatch when it cannot be opened, ConfigError for a device that is
    not here.
    """
    device = as_device(device)
    where = Path(base) if base is not None else pocket()
    source: str | Path = where if os.path.exists(where) else str(base)  # noqa: PTH110 (Path.exists raises for long names)
    if isinstance(source, Path):
        check_folder(source)
    try:
        with silent_loading():
            from diffusers import DiffusionPipeline

            options: Any = {"trust_remote_code": False, "revision": revision, "variant": variant}
            options["use_safetensors"] = True
            folder = source if isinstance(source, Path) else None
            if folder is None and dtype is None and device.type == "cpu":  # whether it fits depends on its files
                folder = Path(DiffusionPipeline.download(source, **options))
            pipe = DiffusionPipeline.from_pretrained(source, dtype=as_dtype(dtype, device, folder), **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseMismatch(
            f"'{source}' could not be opened as a Stable Diffusion base: {_first_line(error)}"
        ) from error
    if type(pipe).__name__ not in _PIPELINES:
        raise BaseMismatch(
            f"'{source}' is a {type(pipe).__name__}; spectral-fusion works on {' or '.join(_PIPELINES)}."
        )
    return pipe.to(device)


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


def check_folder(folder: Path) -> None:
    """Raise BaseMismatch early, where a path is not a diffusers folder of a supported pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise BaseMismatch(f"'{folder}' is not a diffusers folder: it has no model_index.json.")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise BaseMismatch(f"'{index}' is damaged: {_first_line(error)}") from error
    if name not in _PIPELINES:
        raise BaseMismatch(f"'{folder}' is a {name}; spectral-fusion works on {' or '.join(_PIPELINES)}.")


def base_defaults(pipe: Pipeline, table: str) -> dict[str, Any]:
    """What the base's own `fusion.toml` says in a table, such as "training" or "generation"; empty without one."""
    where = pipe.config.get("_name_or_path")
    return read_base_defaults(where if where and Path(str(where)).is_dir() else None, table)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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


def base_info(pipe: Pipeline) -> BaseInfo:
    """What an adapter trained on this pipeline says of its base."""
    where = pipe.config.get("_name_or_path") or getattr(uncompiled(pipe.unet), "name_or_path", "") or "unnamed"
    return BaseInfo(family(pipe), Path(str(where)).name, str(pipe.scheduler.config.prediction_type))
