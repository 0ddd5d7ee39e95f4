"""LoRA as diffusers and PEFT write it, and as both read it.

    unet.<path>.lora_A.weight    down (Q, I)          text_encoder.text_model.<path>.lora_A.weight
    unet.<path>.lora_B.weight    up   (O, Q)

Without an alpha, the scale is 1. Files carry transformers' old `text_model.` level, which diffusers removes for the
flattened CLIPTextModel of transformers >= 5.6.
"""

import json
import math
from collections.abc import Mapping

from fusion.errors import FormatError
from fusion.formats.lora_file import LoraForm
from fusion.layer_names import with_text_model


def key_stem(layer: str, family: str | None) -> str:
    """`text_encoder.encoder.layers.0…` -> `text_encoder.text_model.encoder.layers.0…`; the rest is canonical."""
    component, _, path = layer.partition(".")
    return layer if component == "unet" else f"{component}.{with_text_model(path)}"


def layer_name(stem: str) -> str | None:
    component, _, path = stem.partition(".")
    return f"{component}.{path.removeprefix('text_model.')}"


def stored_scale(metadata: Mapping[str, str], stem: str, rank: int) -> float:
    """alpha / rank by the LoraConfig that newer diffusers stores in the metadata; 1 if there is none.

    Raises FormatError for a config that cannot be read, has alphas that differ, or is no plain LoRA's.
    """
    component = stem.partition(".")[0]
    try:
        entries = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if entries.get(f"{component}.use_dora") or entries.get(f"{component}.alpha_pattern"):
            raise ValueError("DoRA and alpha_pattern are not supported")
        root = math.sqrt(rank) if entries.get(f"{component}.use_rslora") else max(rank, 1)
        scale = float(entries.get(f"{component}.lora_alpha") or rank) / root
        if not math.isfinite(scale):
            raise ValueError(f"the scale is {scale}")
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise FormatError(f"The metadata entry lora_adapter_metadata cannot be honoured: {error}.") from error
    return scale


DIFFUSERS = LoraForm(
    title="diffusers",
    sdxl="diffusers",
    recognises=lambda key: ".lora" in key or ".lokr" in key,
    stem=key_stem,
    layer=layer_name,
    up="lora_B.weight",
    down="lora_A.weight",
    scale=stored_scale,
    alpha=False,
)
