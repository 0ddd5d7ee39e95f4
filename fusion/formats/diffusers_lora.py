"""LoRA as diffusers and PEFT write it, and as both read it. ComfyUI, Forge and InvokeAI read kohya's form only.

    unet.<path>.lora_A.weight    down (Q, I)          text_encoder.text_model.<path>.lora_A.weight
    unet.<path>.lora_B.weight    up   (O, Q)

    base_model.model.<path>.…      a component saved by PEFT alone; its alpha is in adapter_config.json beside it
    <path>.attn1.processor.to_q_lora.down.weight              diffusers of early 2023, with or without `unet.`

PEFT's LoHa, LoKr and DoRA are read, too (`hada_w1_a`, `lokr_w1`, `lora_magnitude_vector`).

Without an alpha, the scale is 1. Files carry transformers' old `text_model.` level, which diffusers removes for the
flattened CLIPTextModel of transformers >= 5.6.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from fusion.errors import FormatError
from fusion.formats.lora_file import ExportForm, LoraForm
from fusion.formats.safetensors_file import OpenFile
from fusion.layer_names import COMPONENTS, component_by_path, component_of, with_text_model

CONFIG, MAX_CONFIG = "adapter_config.json", 2**20
_CONFIG = ("r", "lora_alpha", "alpha", "use_rslora", "use_dora", "alpha_pattern")  # what of it is used
_OLD = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def key_stem(layer: str, family: str | None) -> str:
    """`text_encoder.encoder.layers.0…` -> `text_encoder.text_model.encoder.layers.0…`; the rest is canonical."""
    component, _, path = layer.partition(".")
    return layer if component == "unet" else f"{component}.{with_text_model(path)}"


def layer_name(stem: str) -> str | None:
    path = stem.removeprefix("base_model.model.")
    if path.partition(".")[0] not in COMPONENTS:
        path = f"{component_by_path(path)}.{path}"
    component, _, path = path.partition(".")
    return f"{component}.{path.removeprefix('text_model.')}"


def with_todays_ending(key: str) -> str:
    """`….attn1.processor.to_out_lora.up.weight` -> `….attn1.to_out.0.lora.up.weight`; other keys as they are."""
    match = _OLD.fullmatch(key)
    if match is None:
        return key
    text = match[1].rpartition(".")[2] == "self_attn"
    last = {"out": "out_proj" if text else "to_out.0"}.get(match[2], f"{match[2]}_proj" if text else f"to_{match[2]}")
    return f"{match[1]}.{last}.lora.{match[3]}.weight"


def stored_scale(file: OpenFile, layer: str, rank: int) -> float:
    """alpha / rank by the config of PEFT: in the metadata by diffusers, or beside the file by PEFT; 1 without one.

    `rank`: of the factors; 0 where none is of low rank, as LoKr can be. Raises FormatError for a config that cannot be
    read, or has alphas that differ.
    """
    component = component_of(layer)
    try:
        if "lora_adapter_metadata" in file.metadata:
            entries = json.loads(file.metadata["lora_adapter_metadata"])
            config = {name: entries.get(f"{component}.{name}") for name in _CONFIG}
        else:
            config = _config_beside(file.path)
        if config.get("alpha_pattern"):
            raise ValueError("alpha_pattern is not supported")
        if config.get("use_dora") and not any("lora_magnitude_vector" in key for key in file.shapes):
            raise ValueError("use_dora is set, but there are no magnitudes")
        rank = rank or int(config.get("r") or 1)
        root = math.sqrt(rank) if config.get("use_rslora") else max(rank, 1)
        scale = float(config.get("lora_alpha") or config.get("alpha") or rank) / root
        if not math.isfinite(scale):
            raise ValueError(f"the scale is {scale}")
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise FormatError(
            f"'{file.path}': the metadata entry lora_adapter_metadata, or {CONFIG} beside it, cannot be "
            f"honoured: {error}."
        ) from error
    return scale


def _config_beside(path: Path) -> dict[str, Any]:
    """PEFT's config of a file that it has saved; empty for files of other names."""
    config = path.with_name(CONFIG)
    if path.name != "adapter_model.safetensors":
        return {}
    if not config.is_file():
        raise ValueError("it is missing, and only it says what alpha is")
    if config.stat().st_size > MAX_CONFIG:
        raise ValueError(f"it has more than {MAX_CONFIG:,} bytes")
    entries = json.loads(config.read_text(encoding="utf-8"))
    return {name: entries.get(name) for name in _CONFIG}


DIFFUSERS = LoraForm(
    title="diffusers",
    recognises=lambda key: any(part in key for part in (".lora", "_lora.", ".lokr", ".hada")),
    layer=layer_name,
    scale=stored_scale,
    ending=with_todays_ending,
    export=ExportForm(sdxl="diffusers", stem=key_stem, up="lora_B.weight", down="lora_A.weight", kinds=False),
)
