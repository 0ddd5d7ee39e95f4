"""LoRA as kohya's sd-scripts write it, the form that A1111, Forge, ComfyUI, InvokeAI, diffusers and kohya's tools read.

    lora_unet_<path with _>.lora_down.weight    down (Q, I)        lora_te_text_model_<path with _>.…    SD 1.x, 2.x
    lora_unet_<path with _>.lora_up.weight      up   (O, Q)        lora_te1_…, lora_te2_…                SDXL
    lora_unet_<path with _>.alpha               scale · Q, the same in every layer

SD 1.x and 2.x use diffusers' block names. SDXL uses those of its first release (`input_blocks_4_1_…`): sd-scripts
trains on them, so every program that reads SDXL LoRAs at all reads these, while diffusers' names in kohya's spelling
are an extra that each program supports or not. Both are read here.
"""

import re
from collections.abc import Mapping

from fusion.errors import FormatError
from fusion.formats.lora_file import LoraForm

# Path levels that contain an underscore, so that the others can be told apart.
_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks", "transformer_blocks"),
    *("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj"),
    *("emb_layers", "in_layers", "out_layers", "skip_connection", "time_embed", "label_emb", "linear_1", "linear_2"),
    *("time_embedding", "add_embedding", "text_model", "text_projection", "self_attn"),
    *("q_proj", "k_proj", "v_proj", "out_proj"),
)
_LEVEL = re.compile(rf"({'|'.join(_WORDS)}|[a-z0-9]+)(?:_|$)")
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# SDXL's first names <-> diffusers' names, inside a residual block and outside all blocks.
_RESIDUAL = {
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(attentions|resnets)\.(\d+)\.(.+)")
_FIRST_BLOCK = re.compile(r"(input_blocks|output_blocks|middle_block)(?:\.(\d+))?\.(\d)\.(.+)")
_PER_BLOCK = 3  # SDXL: two layers and a sampler going down, three layers coming up


def key_stem(layer: str, family: str | None) -> str:
    """The beginning of a layer's keys. Raises FormatError for a layer that SDXL's first names do not have."""
    component, _, path = layer.partition(".")
    if component == "unet":
        path = first_name(path) if family == "sdxl" else path
        return f"lora_unet_{path.replace('.', '_')}"
    first = "lora_te1" if family == "sdxl" else "lora_te"
    prefix = first if component == "text_encoder" else "lora_te2"
    path = f"text_model.{path}" if path.startswith("encoder.") else path
    return f"{prefix}_{path.replace('.', '_')}"


def layer_name(stem: str) -> str | None:
    """The canonical name of `lora_unet_…`, by the words a path can consist of; None for another beginning."""
    for prefix, component in _PREFIXES.items():
        if stem.startswith(prefix):
            rest = stem.removeprefix(prefix)
            levels = _LEVEL.findall(rest)
            if "_".join(levels) != rest:
                return None
            path = ".".join(level for level in levels if level != "text_model")
            return f"{component}.{diffusers_name(path) if component == 'unet' else path}"
    return None


def first_name(path: str) -> str:
    """A diffusers UNet path under SDXL's first names: `down_blocks.1.attentions.0.…` -> `input_blocks.4.1.…`."""
    if path in _OUTSIDE.values():
        return next(first for first, name in _OUTSIDE.items() if name == path)
    match = _BLOCK.fullmatch(path)
    if match is None or (match[1] == "down_blocks" and int(match[4]) > 1) or int(match[4]) >= _PER_BLOCK:
        raise FormatError(f"SDXL has no layer unet.{path}, so kohya's form has no name for it; export as 'diffusers'.")
    side, block, kind, layer, tail = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        tail = next((first for first, name in _RESIDUAL.items() if name == tail), tail)
    inner = int(kind == "attentions")
    if side == "mid_block":
        return f"middle_block.{1 if inner else 2 * layer}.{tail}"
    if side == "down_blocks":
        return f"input_blocks.{1 + _PER_BLOCK * block + layer}.{inner}.{tail}"
    return f"output_blocks.{_PER_BLOCK * block + layer}.{inner}.{tail}"


def diffusers_name(path: str) -> str:
    """The inverse of `first_name`; paths under other names are returned as they are."""
    match = _FIRST_BLOCK.fullmatch(path)
    if path in _OUTSIDE or match is None:
        return _OUTSIDE.get(path, path)
    side, inner, tail = match[1], int(match[3]), match[4]
    if side == "middle_block":
        kind, layer = ("attentions", 0) if inner == 1 else ("resnets", inner // 2)
        return f"mid_block.{kind}.{layer}.{_RESIDUAL.get(tail, tail)}"
    block, layer = divmod(int(match[2] or 0) - (side == "input_blocks"), _PER_BLOCK)
    if tail in ("op", "conv"):
        return f"down_blocks.{block}.downsamplers.0.conv" if tail == "op" else f"up_blocks.{block}.upsamplers.0.conv"
    kind = "attentions" if inner else "resnets"
    return f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}.{kind}.{layer}.{_RESIDUAL.get(tail, tail)}"


def unit_scale(metadata: Mapping[str, str], key: str, rank: int) -> float:
    """Without its alpha a layer counts as it is."""
    return 1.0


KOHYA = LoraForm(
    title="kohya",
    implementation="https://github.com/Stability-AI/generative-models",
    stem=key_stem,
    layer=layer_name,
    up="lora_up.weight",
    down="lora_down.weight",
    alpha="alpha",
    scale=unit_scale,
)
