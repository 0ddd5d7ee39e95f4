"""LoRA as kohya's sd-scripts, LyCORIS and OneTrainer write it.

A1111, Forge, ComfyUI, InvokeAI, diffusers and kohya's tools read this form.

    lora_unet_<path with _>.lora_down.weight    down (Q, I)        lora_te_text_model_<path with _>.…    SD 1.x, 2.x
    lora_unet_<path with _>.lora_up.weight      up   (O, Q)        lora_te1_…, lora_te2_…                SDXL
    lora_unet_<path with _>.alpha               scale · Q, the same in every layer

SD 1.x and 2.x use diffusers' block names. SDXL uses those of its first release (`input_blocks_4_1_…`): sd-scripts
trains on them, so every program that reads SDXL LoRAs at all reads these, while diffusers' names in kohya's spelling
are an extra that each program supports or not. Both are read here. LoHa, LoKr, DoRA and the kernels of LoCon have
LyCORIS' names (`hada_w1_a`, `lokr_w1`, `dora_scale`, `lora_mid.weight`), which all of these programs read.
"""

import re

from fusion.errors import FormatError
from fusion.formats.lora_file import ExportForm, LoraForm, no_scale
from fusion.layer_names import component_by_path, diffusers_path, original_path, with_text_model

# Path levels that contain an underscore; all other underscores separate levels.
_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks", "transformer_blocks"),
    *("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "conv_shortcut", "time_emb_proj", "emb_layers"),
    *("conv_in", "conv_out", "in_layers", "out_layers"),
    *("skip_connection", "time_embed", "label_emb", "linear_1", "linear_2", "time_embedding", "add_embedding"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
)
_LEVEL = re.compile(rf"({'|'.join(_WORDS)}|[a-z0-9]+)(?:_|$)")
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lycoris_": "",  # LyCORIS' own program: the path alone
}


def key_stem(layer: str, family: str | None) -> str:
    """The beginning of a layer's keys. Raises FormatError for a layer that SDXL's original names do not have."""
    component, _, path = layer.partition(".")
    if component == "unet":
        prefix, path = "lora_unet_", _sdxl_path(path) if family == "sdxl" else path
    else:
        first = "lora_te1_" if family == "sdxl" else "lora_te_"
        prefix, path = first if component == "text_encoder" else "lora_te2_", with_text_model(path)
    return prefix + path.replace(".", "_")


def _sdxl_path(path: str) -> str:
    if (original := original_path(path)) is None:
        raise FormatError(f"SDXL has no layer unet.{path}, so kohya's form has no name for it; export as 'diffusers'.")
    return original


def layer_name(stem: str) -> str | None:
    """The canonical name of `lora_unet_…`, by the words a path can consist of; None for another beginning."""
    prefix = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), None)
    levels = _LEVEL.findall(stem.removeprefix(prefix or ""))
    if prefix is None or prefix + "_".join(levels) != stem:
        return None
    path = ".".join(level for level in levels if level != "text_model")
    return f"{_PREFIXES[prefix] or component_by_path(path)}.{diffusers_path(path)}"


KOHYA = LoraForm(
    title="kohya",
    recognises=lambda key: key.startswith(("lora_unet_", "lora_te", "lycoris_")),
    layer=layer_name,
    scale=no_scale,
    export=ExportForm(
        sdxl="https://github.com/Stability-AI/generative-models",
        stem=key_stem,
        up="lora_up.weight",
        down="lora_down.weight",
        kinds=True,
    ),
)
