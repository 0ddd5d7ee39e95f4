"""LoRA as kohya's sd-scripts write it, the form that A1111, Forge, ComfyUI, InvokeAI, diffusers and kohya's tools read.

    lora_unet_<path with _>.lora_down.weight    down (Q, I)        lora_te_text_model_<path with _>.…    SD 1.x, 2.x
    lora_unet_<path with _>.lora_up.weight      up   (O, Q)        lora_te1_…, lora_te2_…                SDXL
    lora_unet_<path with _>.alpha               scale · Q, the same in every layer

SD 1.x and 2.x use diffusers' block names. SDXL uses those of its first release (`input_blocks_4_1_…`): sd-scripts
trains on them, so every program that reads SDXL LoRAs at all reads these, while diffusers' names in kohya's spelling
are an extra that each program supports or not. Both are read here.
"""

import re

from fusion.errors import FormatError
from fusion.formats.lora_file import LoraForm

# Path levels that contain an underscore, so that the others can be told apart.
_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks", "transformer_blocks"),
    *("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "conv_shortcut", "time_emb_proj", "emb_layers"),
    *("skip_connection", "time_embed", "label_emb", "linear_1", "linear_2", "time_embedding", "add_embedding"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
)
_LEVEL = re.compile(rf"({'|'.join(_WORDS)}|[a-z0-9]+)(?:_|$)")
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# SDXL's first names, in diffusers' words: within a residual block, and outside all blocks.
_LATER = {
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_FIRST = {later: first for first, later in _LATER.items()}
_LATER_BLOCK = re.compile(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(attentions|resnets)\.(\d+)\.(.+)")
_FIRST_BLOCK = re.compile(r"(input_blocks\.\d+|output_blocks\.\d+|middle_block)\.(\d)\.(.+)")
_PER_BLOCK = 3  # SDXL: two layers and a sampler going down, three layers coming up
_LAYERS = {"down_blocks": 2, "mid_block": 2, "up_blocks": 3}


def key_stem(layer: str, family: str | None) -> str:
    """The beginning of a layer's keys. Raises FormatError for a layer that SDXL's first names do not have."""
    component, _, path = layer.partition(".")
    if component == "unet":
        prefix, path = "lora_unet_", first_name(path) if family == "sdxl" else path
    else:
        first = "lora_te1_" if family == "sdxl" else "lora_te_"
        prefix = first if component == "text_encoder" else "lora_te2_"
        path = f"text_model.{path}" if path.startswith("encoder.") else path
    return prefix + path.replace(".", "_")


def layer_name(stem: str) -> str | None:
    """The canonical name of `lora_unet_…`, by the words a path can consist of; None for another beginning."""
    prefix = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), None)
    levels = _LEVEL.findall(stem.removeprefix(prefix or ""))
    if prefix is None or prefix + "_".join(levels) != stem:
        return None
    path = ".".join(level for level in levels if level != "text_model")
    return f"{_PREFIXES[prefix]}.{later_name(path)}"


def first_name(path: str) -> str:
    """A diffusers UNet path under SDXL's first names: `down_blocks.1.attentions.0.…` -> `input_blocks.4.1.…`."""
    if path in _FIRST:
        return _FIRST[path]
    match = _LATER_BLOCK.fullmatch(path)
    side, _, block = match[1].partition(".") if match else ("", "", "")
    if match is None or int(match[3]) >= _LAYERS[side]:
        raise FormatError(f"SDXL has no layer unet.{path}, so kohya's form has no name for it; export as 'diffusers'.")
    inner, layer, tail = int(match[2] == "attentions"), int(match[3]), _FIRST.get(match[4], match[4])
    if side == "mid_block":
        return f"middle_block.{1 if inner else 2 * layer}.{tail}"
    number = _PER_BLOCK * int(block) + layer
    return (
        f"input_blocks.{1 + number}.{inner}.{tail}"
        if side == "down_blocks"
        else f"output_blocks.{number}.{inner}.{tail}"
    )


def later_name(path: str) -> str:
    """The inverse of `first_name`; paths under other names are returned as they are."""
    match = _FIRST_BLOCK.fullmatch(path)
    if match is None:
        return _LATER.get(path, path)
    (side, _, number), inner, tail = match[1].partition("."), int(match[2]), _LATER.get(match[3], match[3])
    if side == "middle_block":
        return f"mid_block.attentions.0.{tail}" if inner == 1 else f"mid_block.resnets.{inner // 2}.{tail}"
    down, kind = side == "input_blocks", "attentions" if inner else "resnets"
    block, layer = divmod(int(number) - down, _PER_BLOCK)
    return f"{'down' if down else 'up'}_blocks.{block}.{kind}.{layer}.{tail}"


KOHYA = LoraForm(
    title="kohya",
    sdxl="https://github.com/Stability-AI/generative-models",
    stem=key_stem,
    layer=layer_name,
    up="lora_up.weight",
    down="lora_down.weight",
    scale=lambda metadata, stem, rank: 1.0,
    alpha=True,
)
