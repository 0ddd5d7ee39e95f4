"""LoRA as diffusers and PEFT write it, the form that diffusers, InvokeAI and ComfyUI read.

    unet.<path>.lora_A.weight    down (Q, I)          text_encoder.text_model.<path>.lora_A.weight
    unet.<path>.lora_B.weight    up   (O, Q)

Without an alpha, the scale is 1. Files carry transformers' old `text_model.` level, which diffusers removes for the
flattened CLIPTextModel of transformers >= 5.6 and ComfyUI insists on.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fusion.errors import FormatError
from fusion.formats.lora_file import LoraForm, split_key

_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]+")


def key_stem(layer: str, family: str | None) -> str:
    """`text_encoder.encoder.layers.0…` -> `text_encoder.text_model.encoder.layers.0…`; the rest is canonical."""
    component, _, path = layer.partition(".")
    inside = component != "unet" and path.startswith("encoder.")
    return f"{component}.text_model.{path}" if inside else layer


def layer_name(stem: str) -> str | None:
    component, _, path = stem.partition(".")
    return f"{component}.{path.removeprefix('text_model.')}" if path else None


def stored_scale(metadata: Mapping[str, str], key: str, rank: int) -> float:
    """alpha / rank of a layer by the LoraConfig that newer diffusers stores in the metadata; 1 if there is none.

    Raises FormatError for a config that cannot be read, or is no plain LoRA's.
    """
    if "lora_adapter_metadata" not in metadata:
        return 1.0
    component, _, path = (split_key(key) or (key, ""))[0].partition(".")
    try:
        entries: dict[str, Any] = json.loads(metadata["lora_adapter_metadata"])
        config = {k.removeprefix(f"{component}."): v for k, v in entries.items() if k.startswith(f"{component}.")}
        alpha = float(config.get("lora_alpha") or rank)
        for pattern, value in dict(config.get("alpha_pattern") or {}).items():
            alpha = float(value) if _names(pattern, path) else alpha
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise FormatError(f"The metadata entry lora_adapter_metadata cannot be read: {error}.") from error
    if config.get("use_dora") or not math.isfinite(scale):
        raise FormatError(f"The metadata say that {component} is no plain LoRA, or scale it by {scale}.")
    return scale


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern of PEFT means this path: in practice its last levels. ^: all of them."""
    if not _PLAIN.fullmatch(pattern):
        raise ValueError(f"alpha_pattern '{pattern[:60]}' is a regular expression")
    whole, end = (f".{text.removeprefix('^').removeprefix('text_model.')}" for text in (path, pattern))
    return whole == end if pattern.startswith("^") else whole.endswith(end)


DIFFUSERS = LoraForm(
    title="diffusers",
    implementation="diffusers",
    stem=key_stem,
    layer=layer_name,
    up="lora_B.weight",
    down="lora_A.weight",
    alpha=None,
    scale=stored_scale,
)
