"""What layers are called, as strings: here, and in the files of other programs. Nothing here needs torch.

A canonical name is the component, then diffusers' path inside it, as `unet.mid_block.attentions.0.proj_in` or
`text_encoder.encoder.layers.0.self_attn.q_proj`. Levels that only some versions and wrappers have are left out:
`text_model.` of older transformers, `_orig_mod.` of torch.compile, `module.` of data parallelism and `base_layer.` of
PEFT.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Component(NamedTuple):
    """A submodel that adapters can change, and the kinds of rows its layers are given.

    Where the rows of a layer's input are the prompt's tokens, a gate acts position by position. In every other layer a
    row is a cell of a picture, or a whole picture, and a gate opens by picture or by region.
    """

    tokenizer: str  # attribute of the pipeline; none for the denoiser
    token_layers: str  # regular expression: paths of the layers whose rows are tokens
    attention: tuple[str, ...]  # its attention layers, which the bare name means as a target
    gated_targets: tuple[str, ...]  # default targets of an adapter with gates, where every row is a token (law 19)
    targets: tuple[str, ...]  # and of one without: the paper's


# Text encoders in the order in which their embeddings are joined. CLIP's projection is applied to one pooled row.
_CLIP = r"(?!text_projection).*"
COMPONENTS: Mapping[str, Component] = {
    "unet": Component(
        "",
        r".*\.attn2\.to_[kv]",
        ("attn1", "attn2"),
        ("unet.attn2.to_k", "unet.attn2.to_v"),
        ("unet.attn1", "unet.attn2"),
    ),
    "text_encoder": Component("tokenizer", _CLIP, ("self_attn",), ("text_encoder",), ("text_encoder",)),
    "text_encoder_2": Component("tokenizer_2", _CLIP, ("self_attn",), ("text_encoder_2",), ("text_encoder_2",)),
}
TOKENIZERS = {name: component.tokenizer for name, component in COMPONENTS.items() if component.tokenizer}
LAYER_NAME = rf"(?:{'|'.join(COMPONENTS)})(?:\.[A-Za-z0-9_]+)+"  # any canonical name, as a regular expression
_OPTIONAL_LEVELS = {"text_model", "_orig_mod", "module", "base_layer"}

_UNET_LAYER = (
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets\.\d+\.(time_emb_proj|conv_shortcut)|attentions\.\d+\."
    r"(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))))"
    r"|(time|add)_embedding\.linear_[12]"
)
_CONVOLUTION = r"conv_(in|out)|.*\.(resnets\.\d+\.conv[12]|(down|up)samplers\.0\.conv)"
_TEXT_LAYER = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])|text_projection"
_ADAPTABLE = re.compile(rf"unet\.({_UNET_LAYER})|text_encoder(_2)?\.({_TEXT_LAYER})")

# SDXL's UNet in the names of its first release (Stability AI's generative-models), outside of its blocks and in them.
_DIFFUSERS = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_ORIGINAL = {diffusers: original for original, diffusers in _DIFFUSERS.items()}
_DIFFUSERS_BLOCK = re.compile(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(attentions|resnets)\.(\d+)\.(.+)")
_ORIGINAL_BLOCK = re.compile(r"(input_blocks\.\d+|output_blocks\.\d+|middle_block)\.(\d)\.(.+)")
_PER_BLOCK = 3  # numbered blocks of the original for one of diffusers: 2 layers and a sampler down, 3 layers up
_LAYERS = {"down_blocks": 2, "mid_block": 2, "up_blocks": 3}


def canonical(component: str, path: str) -> str:
    """The canonical name of the module at `path` below a component."""
    return ".".join([component, *(level for level in path.split(".") if level not in _OPTIONAL_LEVELS)])


def component_of(layer: str) -> str:
    return layer.partition(".")[0]


def is_adaptable(layer: str) -> bool:
    """Whether Stable Diffusion 1.x, 2.x or XL has such a layer, and its weight is one matrix."""
    return _ADAPTABLE.fullmatch(layer) is not None


def is_importable(layer: str) -> bool:
    """Whether imported adapters may change it: adaptable layers, and the convolutions of the UNet."""
    return is_adaptable(layer) or kernel_of(layer, None) == (3, 3)


def kernel_of(layer: str, family: str | None) -> tuple[int, ...]:
    """The kernel of a layer in the base: 1x1 of SD 1.x's projections, and of shortcuts in all; () of a linear layer."""
    component, _, path = layer.partition(".")
    last = path.rpartition(".")[2]
    if component == "unet" and re.fullmatch(_CONVOLUTION, path):
        return (3, 3)
    return (1, 1) if last == "conv_shortcut" or (family == "sd1" and last in ("proj_in", "proj_out")) else ()


def sees_tokens(layer: str) -> bool:
    """Whether the rows of this layer's input are the prompt's tokens: here a gate can act position by position."""
    component, _, path = layer.partition(".")
    return component in COMPONENTS and re.fullmatch(COMPONENTS[component].token_layers, path) is not None


def component_by_path(path: str) -> str:
    """The component that a path without one belongs to: a text encoder's begins with its encoder, all else is a UNet's.

    Of two text encoders, the first: their paths are alike.
    """
    return "text_encoder" if re.match(r"(text_model\.)?encoder\.layers|text_projection", path) else "unet"


def with_text_model(path: str) -> str:
    """A path in a text encoder with transformers' old level, which files of LoRAs keep: `text_model.encoder.…`."""
    return f"text_model.{path}" if path.startswith("encoder.") else path


def original_path(path: str) -> str | None:
    """A path in SDXL's UNet in its original names: `down_blocks.1.attentions.0.…` is `input_blocks.4.1.…`.

    None where SDXL has no such layer.
    """
    if path in _ORIGINAL:
        return _ORIGINAL[path]
    if sampler := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", path):
        number = _PER_BLOCK * int(sampler[2]) + 2
        return f"input_blocks.{number + 1}.0.op" if sampler[1] == "down" else f"output_blocks.{number}.2.conv"
    match = _DIFFUSERS_BLOCK.fullmatch(path)
    side, _, block = match[1].partition(".") if match else ("", "", "")
    if match is None or int(match[3]) >= _LAYERS[side]:
        return None
    inner, layer, end = int(match[2] == "attentions"), int(match[3]), _ORIGINAL.get(match[4], match[4])
    if side == "mid_block":
        return f"middle_block.{1 if inner else 2 * layer}.{end}"
    number = _PER_BLOCK * int(block) + layer
    down = side == "down_blocks"
    return f"input_blocks.{1 + number}.{inner}.{end}" if down else f"output_blocks.{number}.{inner}.{end}"


def diffusers_path(path: str) -> str:
    """The inverse of `original_path`; paths in other names are returned as they are."""
    match = _ORIGINAL_BLOCK.fullmatch(path)
    if match is None:
        return _DIFFUSERS.get(path, path)
    (side, _, number), inner, end = match[1].partition("."), int(match[2]), _DIFFUSERS.get(match[3], match[3])
    if side == "middle_block":
        return f"mid_block.attentions.0.{end}" if inner == 1 else f"mid_block.resnets.{inner // 2}.{end}"
    down, kind = side == "input_blocks", "attentions" if inner else "resnets"
    block, layer = divmod(int(number) - down, _PER_BLOCK)
    if end in ("op", "conv"):
        return f"{'down' if down else 'up'}_blocks.{block}.{'down' if down else 'up'}samplers.0.conv"
    return f"{'down' if down else 'up'}_blocks.{block}.{kind}.{layer}.{end}"
