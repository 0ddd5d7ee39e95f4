"""Opening a base model from a diffusers folder, a hub id or one file, without running anybody else's code."""

import inspect
import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError

from fusion.base_models.single_file import CLASSES, configs_of, load_single_file, load_vae, read_single_file
from fusion.errors import BaseMismatch, ConfigError, closest
from fusion.models.base_check import allow_other_bases
from fusion.models.devices import as_device, as_dtype
from fusion.models.embedded_models import pocket
from fusion.models.float32_layers import compute_in_float32
from fusion.models.layer_sites import components
from fusion.models.low_memory import enable_low_memory
from fusion.models.pipelines import family, silent_loading
from fusion.models.stored_weights import stored_dtype, stored_variants

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_PIPELINES = tuple(dict.fromkeys(CLASSES.values()))
_INPAINTING = tuple(name.replace("Pipeline", "InpaintPipeline") for name in _PIPELINES)
_UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SingleFileComponentError,
)  # fmt: skip


def open_pipeline(
    base: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
    base_config: str | Path | None = None,
    pretrained_vae_model_name_or_path: str | Path | None = None,
    other_base: bool = False,
    low_memory: bool = False,
) -> Any:
    """A Stable Diffusion pipeline from a folder, hub id or single file, `pocket` by default, ready on `device`.

    Weights in safetensors only and no code from the model's repository. Device: CUDA, else Apple's GPU, else CPU.
    dtype, one for all components: on a GPU bfloat16 where the card computes in it, else float16; on a CPU float32, or
    bfloat16 where that would take more than half of the free memory; "stored": that of the UNet's files, as far as
    layers compute in it. `prediction_type` and `rescale_betas_zero_snr` are
    for a base that does not say, or wrongly, how it was trained. `base_config` is a diffusers folder with configs for
    a single file, instead of those of its family; `pretrained_vae_model_name_or_path` is a folder, hub id or file with
    another VAE. With `other_base` adapters of other bases of its shapes can be attached, too. `low_memory` is for
    drawing large pictures on a small GPU: only the model that computes is on it, and the VAE works in tiles of 512 px.

    While it runs, other threads may load adapters, and must not attach, train or draw: diffusers and transformers open
    models under a default dtype, and without memory for parameters, that hold for all threads. Raises BaseMismatch when
    it cannot be opened, ConfigError for a device that is not here or settings that do not suit.
    """
    device, vae = as_device(device), pretrained_vae_model_name_or_path
    if prediction_type not in (None, *PREDICTION_TYPES):
        near = closest(prediction_type, PREDICTION_TYPES)
        raise ConfigError(f"prediction_type is one of {', '.join(PREDICTION_TYPES)}, got '{prediction_type}'{near}")
    where = Path(base) if base is not None else pocket()
    config = Path(base_config) if base_config is not None else None
    if is_file(where):
        number = as_dtype(_stored(dtype, where), device, where)
        pipe = _from_file(where, config, number, prediction_type, rescale_betas_zero_snr, vae)
    elif config is not None:
        raise ConfigError(f"base_config is for a base in a single file; '{base}' has configs of its own.")
    else:
        exists = os.path.exists(where)  # noqa: PTH110 (Path.exists raises for long names)
        pipe = _from_folder(where if exists else str(base), device, dtype, revision, variant)
        pipe.scheduler = with_noise(pipe.scheduler, prediction_type, rescale_betas_zero_snr)
        if vae is not None:
            with _explained(f"'{vae}' could not be opened as a VAE"):
                module = load_vae(vae, where if exists else configs_of(family(pipe)), pipe.dtype)
            pipe.register_modules(vae=module)
    scale, channels = 2 ** (len(pipe.vae.config.block_out_channels) - 1), pipe.vae.config.latent_channels
    if (scale, channels) != (pipe.vae_scale_factor, pipe.unet.config.out_channels):
        raise ConfigError(
            f"The VAE '{vae}' does not suit this base: {channels} channels and {scale} pixels a cell instead of "
            f"{pipe.unet.config.out_channels} and {pipe.vae_scale_factor}."
        )
    if other_base:
        allow_other_bases(pipe)
    if device.type == "cpu" and pipe.unet.dtype != torch.float32:
        compute_in_float32(pipe.vae, *components(pipe).values())
    if low_memory:
        enable_low_memory(pipe, device)
        return pipe
    return pipe.to(device)


def is_file(base: str | Path | None) -> bool:
    """Whether a base is one file, not a folder or a hub id."""
    return base is not None and os.path.exists(base) and not os.path.isdir(base)  # noqa: PTH110, PTH112


def _from_folder(
    source: Path | str, device: torch.device, dtype: torch.dtype | str | None, revision: str | None, variant: str | None
) -> Any:
    if isinstance(source, Path):
        check_folder(source)
    with _explained(f"'{source}' could not be opened as a Stable Diffusion base"):
        options: Any = {"trust_remote_code": False, "revision": revision, "variant": variant, "use_safetensors": True}
        folder = source if isinstance(source, Path) else None
        if folder is None and (dtype == "stored" or (dtype is None and device.type == "cpu")):  # depends on its files
            folder = Path(diffusers.DiffusionPipeline.download(source, **options))
        number = as_dtype(_stored(dtype, folder, variant), device, folder)
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=number, **options)
        except _UNREADABLE:
            if folder is not None and (quantised := _quantised(folder)):
                raise RuntimeError(
                    f"its {quantised}, and adapters need the weights themselves; take it in float16 or bfloat16."
                ) from None
            if folder is not None and not variant and (variants := stored_variants(folder)):
                raise RuntimeError(
                    f"it holds its UNet as {' and '.join(variants)} only: --variant {variants[0]}"
                ) from None
            raise
    if type(pipe).__name__ not in (*_PIPELINES, *_INPAINTING):
        raise BaseMismatch(
            f"'{source}' is a {type(pipe).__name__}; spectral-fusion works on {' or '.join(_PIPELINES)}."
        )
    return pipe


def _from_file(
    path: Path, config: Path | None, dtype: torch.dtype, prediction: str | None, zero_snr: bool | None,
    vae: str | Path | None,
) -> Any:  # fmt: skip
    file = read_single_file(path, needs_vae=vae is None)
    if config is not None:
        check_folder(config)
    with _explained(f"'{path}' could not be opened as a Stable Diffusion base"):
        parts = {"vae": load_vae(vae, config or configs_of(file.family), dtype)} if vae is not None else {}
        pipe = load_single_file(file, config, dtype, **parts)
    prediction = prediction or file.prediction
    if prediction is None and config is None and file.family == "sd2":
        logger.warning(
            "'%s' does not say what it predicts: taken for SD 2.x at 768 px, which predicts v. If its pictures are "
            "noise, it is one of 512 px: --prediction_type epsilon.", path.name,
        )  # fmt: skip
    if file.family == "sd2" and prediction == "epsilon" and config is None:
        pipe.unet.register_to_config(sample_size=64)  # 512 px, where its family's config says 768
    pipe.scheduler = with_noise(pipe.scheduler, prediction, file.zero_snr or None if zero_snr is None else zero_snr)
    return pipe


def with_noise(scheduler: ConfigMixin, prediction_type: str | None, zero_snr: bool | None) -> Any:
    """A scheduler for what the UNet predicts and for its noise; None leaves either as it is.

    Without a signal at the last timestep (zero terminal SNR), a picture has to start there: trailing timesteps. A class
    that cannot rescale its noise gives way to DDIM.
    """
    changes = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return scheduler
    kind: Any = type(scheduler)
    if zero_snr:
        changes["timestep_spacing"] = "trailing"
        if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
            kind = diffusers.DDIMScheduler
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config({k: v for k, v in {**scheduler.config, **changes}.items() if k in known})


def _stored(dtype: torch.dtype | str | None, base: Path | None, variant: str | None = None) -> torch.dtype | str | None:
    """The dtype as it is given, "stored" as that of the base's files; None where these cannot be computed in."""
    return stored_dtype(base, variant) if dtype == "stored" and base is not None else dtype


def check_folder(folder: Path) -> None:
    """Raise BaseMismatch early, where a path is not a diffusers folder of a supported pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise BaseMismatch(f"'{folder}' is not a diffusers folder: it has no model_index.json.")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise BaseMismatch(f"'{index}' is damaged: {_first_line(error)}") from error
    if name not in (*_PIPELINES, *_INPAINTING):
        raise BaseMismatch(f"'{folder}' is a {name}; spectral-fusion works on {' or '.join(_PIPELINES)}.")


def _quantised(folder: Path) -> str | None:
    """Which component of a diffusers folder is quantised, and how."""
    for path in sorted(folder.glob("*/config.json")):
        with suppress(ValueError, AttributeError):
            if (config := json.loads(path.read_text(encoding="utf-8")).get("quantization_config")) is not None:
                return f"{path.parent.name} is quantised ({config.get('quant_method', 'by an unknown method')})"
    return None


@contextmanager
def _explained(problem: str) -> Generator[None]:
    """Loading without advice and bars; what goes wrong in it, as one line."""
    try:
        with silent_loading():
            yield
    except _UNREADABLE as error:
        raise BaseMismatch(f"{problem}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__
