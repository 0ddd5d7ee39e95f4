"""LoRA files of other programs: what all their forms share. How a form names layers is its own file's business.

Shapes: O out_features, I in_features, Q rank of a delta.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, BaseInfo, Branch, Provenance
from fusion.adapters.lora import LoraLayer
from fusion.errors import FormatError
from fusion.formats.metadata import foreign_base, kohya_entries, modelspec
from fusion.formats.safetensors_file import OpenFile, TensorInfo, cast, content_hash, write_file
from fusion.spectral.delta import Delta

# Endings of keys, in every form.
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}
# Changes that are no product of two factors, by a piece of their keys.
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a LoCon with Tucker cores",
    "lora_B.bias": "a LoRA that changes biases",
    ".diff": "a full fine-tune stored as differences",
}
_UNET = (
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
    r"(attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
    r"|resnets\.\d+\.(time_emb_proj|conv_shortcut|conv1|conv2)|(down|up)samplers\.0\.conv)"
    r"|time_embedding\.linear_[12]|add_embedding\.linear_[12]|conv_in|conv_out"
)
_TEXT = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])|text_projection"
_KNOWN = re.compile(rf"unet\.({_UNET})|text_encoder(_2)?\.({_TEXT})")


@dataclass(frozen=True)
class LoraForm:
    """How one family of programs writes the keys of a LoRA."""

    title: str
    implementation: str  # ModelSpec: whose layer names these are, for SDXL
    stem: Callable[[str, str | None], str]  # layer name, family of the base -> its keys' beginning
    layer: Callable[[str], str | None]  # the inverse; None: not a name in this form
    up: str  # endings of the keys
    down: str
    alpha: str | None  # None: the form has no alpha, its scale is always 1
    scale: Callable[[Mapping[str, str], str, int], float]  # metadata, keys' beginning, rank -> scale without alpha


def write_lora(form: LoraForm, info: AdapterInfo, deltas: Mapping[str, Delta], path: Path, dtype: str) -> None:
    """Write changes of whole layers as a LoRA: without alpha, or with alpha = the largest rank."""
    family = info.base.family if info.base else None
    rank = max(delta.rank for delta in deltas.values())
    tensors: dict[str, Tensor] = {}
    for layer, delta in deltas.items():
        stem, pixels = form.stem(layer, family), (1, 1) if is_convolution(layer, family) else ()
        # One alpha for all layers: diffusers loses alphas that differ. Where ranks differ, `up` makes up for it.
        even = balanced(delta * (delta.rank / rank) if form.alpha else delta)
        tensors[f"{stem}.{form.down}"] = even.down.reshape(*even.down.shape, *pixels)  # (Q, I)
        tensors[f"{stem}.{form.up}"] = even.up.reshape(*even.up.shape, *pixels)  # (O, Q)
        if form.alpha:
            tensors[f"{stem}.{form.alpha}"] = torch.tensor(float(rank))
    made = cast(tensors, dtype)
    digest = content_hash(made)
    metadata = {
        "format": "pt",
        **modelspec(info, "lora", implementation=form.implementation if family == "sdxl" else "diffusers"),
        **kohya_entries(info, rank, rank),
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
    }
    write_file(path, made, metadata)


def balanced(delta: Delta) -> Delta:
    """The same ΔW, with equally long factors, so that neither loses bits to float16's narrow range.

    Every term of the sum is scaled by a power of two, which is exact in floating point.
    """
    ratio = torch.linalg.vector_norm(delta.down, dim=1) / torch.linalg.vector_norm(delta.up, dim=0)  # (Q,)
    exponent = (ratio.log2() / 2).round().nan_to_num(0, 0, 0)
    return Delta(torch.ldexp(delta.up, exponent), torch.ldexp(delta.down, -exponent[:, None]))


def is_convolution(layer: str, family: str | None) -> bool:
    """Whether a layer that can be adapted is a 1x1 convolution in the base: SD 1.x's projections, shortcuts in all."""
    last = layer.rpartition(".")[2]
    return last == "conv_shortcut" or (family == "sd1" and last in ("proj_in", "proj_out") and ".attentions." in layer)


def read_lora(file: OpenFile, form: LoraForm) -> Adapter:
    """A LoRA file as an ungated adapter of type lora, its scales folded into `up`.

    Raises FormatError for other kinds of adapters, and for any key that is not understood: nothing is skipped.
    """
    tensors, metadata = file.header.tensors, file.header.metadata
    _refuse_other_kinds(file.path, tensors)
    found = _grouped(file.path, form, tensors)
    layers: dict[str, LoraLayer] = {}
    for layer, keys in found.items():
        rank = _checked_rank(file.path, layer, keys, tensors)
        down, up = file.tensor(keys["down"]).flatten(1), file.tensor(keys["up"]).flatten(1)  # (Q, I), (O, Q)
        if "alpha" in keys:
            scale = float(file.tensor(keys["alpha"]).reshape(())) / max(rank, 1)
        else:
            scale = form.scale(metadata, keys["down"], rank)
        layers[layer] = LoraLayer(up if scale == 1 else up.float() * scale, down)
    name = file.path.stem
    tool = Provenance(
        f"import of a {form.title} LoRA", settings={"merged_from": metadata.get("modelspec.merged_from", "")}
    )
    base = foreign_base(metadata) or _base_by_structure(found, tensors)
    return Adapter(AdapterInfo(name, base, (), tool), (Branch(name, "lora", layers),), {})


def split_key(key: str) -> tuple[str, str] | None:
    """(beginning, "up" | "down" | "alpha") of a key; None if it ends in none of these."""
    for ending, part in _PARTS.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), part
    return None


def _refuse_other_kinds(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for piece, kind in _OTHERS.items():
        if other := next((key for key in tensors if piece in key), None):
            raise FormatError(
                f"'{path}' is {kind} ({other}), which is no product of two factors; only plain LoRA can be imported."
            )


def _grouped(path: Path, form: LoraForm, tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """Layer name -> part -> key, of every key of the file."""
    found: dict[str, dict[str, str]] = {}
    strange: list[str] = []
    for key in tensors:
        stem, part = split_key(key) or ("", "")
        layer = form.layer(stem)
        if layer is None or not _KNOWN.fullmatch(layer) or part in found.get(layer, {}):
            strange.append(key)
        else:
            found.setdefault(layer, {})[part] = key
    lacking = [layer for layer, parts in found.items() if not {"up", "down"} <= parts.keys()]
    if strange or lacking or not found:
        what = f"{len(strange)} of its {len(tensors)} keys name no layer of Stable Diffusion 1.x, 2.x or XL"
        if not strange:
            what = f"{len(lacking)} of its layers lack a factor"
        examples = ", ".join([*strange, *lacking][:3])
        raise FormatError(f"'{path}' cannot be imported as a {form.title} LoRA: {what} ({examples}).")
    return found


def _checked_rank(path: Path, layer: str, keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> int:
    """The rank of one layer's factors, by their shapes."""
    down, up = tensors[keys["down"]].shape, tensors[keys["up"]].shape
    if any(math.prod(shape[2:]) != 1 for shape in (down, up)):
        raise FormatError(
            f"'{path}' changes the convolution {layer} with a kernel {down[2:]}; only 1x1 can be imported."
        )
    alpha = tensors[keys["alpha"]].shape if "alpha" in keys else ()
    if len(down) not in (2, 4) or len(up) != len(down) or down[0] != up[1] or math.prod(alpha) != 1:
        raise FormatError(f"'{path}': the factors of {layer} have shapes {up} and {down}, which make no product.")
    return down[0]


def _base_by_structure(found: Mapping[str, Mapping[str, str]], tensors: Mapping[str, TensorInfo]) -> BaseInfo | None:
    """SDXL has a second text encoder, SD 1.x convolutions for projections; other silent files stay unknown."""
    if any(layer.startswith("text_encoder_2.") for layer in found):
        return BaseInfo("sdxl", "unknown", "epsilon")
    projections = [keys["down"] for layer, keys in found.items() if is_convolution(layer, "sd1") and "proj_" in layer]
    if any(len(tensors[key].shape) == 4 for key in projections):
        return BaseInfo("sd1", "unknown", "epsilon")
    return None
