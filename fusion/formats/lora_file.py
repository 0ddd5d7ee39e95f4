"""LoRA files of other programs: what all their forms share. How a form names layers is in its own file.

Shapes: O out_features, I in_features, Q rank of a delta.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Provenance
from fusion.adapters.lora import LoraLayer
from fusion.errors import FormatError
from fusion.formats.metadata import foreign_base, kohya_entries, modelspec
from fusion.formats.safetensors_file import OpenFile, write_file
from fusion.layer_names import is_adaptable, is_convolution
from fusion.spectral.delta import Delta

# Endings of keys, in every form.
_PARTS = {
    **dict.fromkeys(("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys(("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"), "up"),
    "alpha": "alpha",
}


@dataclass(frozen=True)
class LoraForm:
    """How one family of programs writes the keys of a LoRA."""

    title: str
    sdxl: str  # ModelSpec's implementation: whose layer names these are for SDXL
    recognises: Callable[[str], bool]  # whether a key shows that a file is in this form
    stem: Callable[[str, str | None], str]  # layer name, family of the base -> its keys' beginning
    layer: Callable[[str], str | None]  # the inverse; None: not a name in this form
    up: str  # endings of the keys
    down: str
    scale: Callable[[Mapping[str, str], str, int], float]  # metadata, keys' beginning, rank -> scale without alpha
    alpha: bool  # whether it is written; a form without has a scale of 1


def write_lora(form: LoraForm, info: AdapterInfo, deltas: Mapping[str, Delta], path: Path, dtype: str) -> None:
    """Write changes of whole layers as a LoRA: without alpha, or with alpha = the largest rank."""
    family = info.base.family if info.base else None
    rank = max([1, *(delta.rank for delta in deltas.values())])
    tensors: dict[str, Tensor] = {}
    for layer, delta in deltas.items():
        stem, kernel = form.stem(layer, family), (1, 1) if is_convolution(layer, family) else ()
        # One alpha for all layers: diffusers loses alphas that differ. Where ranks differ, `up` makes up for it.
        factors = balanced(delta * (delta.rank / rank) if form.alpha else delta)
        tensors[f"{stem}.{form.down}"] = factors.down.reshape(*factors.down.shape, *kernel)  # (Q, I)
        tensors[f"{stem}.{form.up}"] = factors.up.reshape(*factors.up.shape, *kernel)  # (O, Q)
        if form.alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    spec = modelspec(info, "lora", implementation=form.sdxl if family == "sdxl" else "diffusers")
    write_file(path, tensors, {"format": "pt", **spec, **kohya_entries(info, rank)}, dtype)


def balanced(delta: Delta) -> Delta:
    """The same ΔW, with equally long factors, so that neither loses bits to float16's narrow range.

    Every term of the sum is scaled by a power of two, which is exact in floating point.
    """
    ratio = torch.linalg.vector_norm(delta.down, dim=1) / torch.linalg.vector_norm(delta.up, dim=0)  # (Q,)
    exponent = (ratio.log2() / 2).round().nan_to_num(0, 0, 0)
    return Delta(torch.ldexp(delta.up, exponent), torch.ldexp(delta.down, -exponent[:, None]))


def read_lora(file: OpenFile, form: LoraForm) -> Adapter:
    """A LoRA file as an ungated adapter of type lora, its scales folded into `up`.

    Raises FormatError for other kinds of adapters, and for any key that is not understood: nothing is skipped.
    """
    layers: dict[str, LoraLayer] = {}
    for layer, keys in _grouped(file, form).items():
        _check_shapes(file, layer, keys)
        down, up = file.tensor(keys["down"]).flatten(1), file.tensor(keys["up"]).flatten(1)  # (Q, I), (O, Q)
        if "alpha" in keys:
            scale = float(file.tensor(keys["alpha"])) / max(len(down), 1)
        else:
            scale = form.scale(file.metadata, keys["stem"], len(down))
        layers[layer] = LoraLayer(up if scale == 1 else up.float() * scale, down)
    name, settings = file.path.stem, {"merged_from": file.metadata.get("modelspec.merged_from", "")}
    provenance = Provenance(f"import of a {form.title} LoRA", settings=settings)
    return Adapter(
        AdapterInfo(name, foreign_base(file.metadata), (), provenance), (Branch(name, "lora", layers),), tokens={}
    )


def _grouped(file: OpenFile, form: LoraForm) -> dict[str, dict[str, str]]:
    """Layer name -> "up", "down", "alpha" -> key, of every key of the file; beside them "stem", the keys' beginning."""
    layers: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in file.shapes:
        ending = next((ending for ending in _PARTS if key.endswith(f".{ending}")), "")
        stem = key.removesuffix(f".{ending}")
        layer = form.layer(stem) if ending else None
        if layer is None or not is_adaptable(layer) or _PARTS[ending] in layers.get(layer, {}):
            unknown.append(key)
        else:
            layers.setdefault(layer, {"stem": stem})[_PARTS[ending]] = key
    if unknown:
        raise FormatError(
            f"'{file.path}' cannot be imported as a {form.title} LoRA: {len(unknown)} of its {len(file.shapes)} keys "
            f"are not those of a plain LoRA ({', '.join(unknown[:3])}). Other kinds, such as DoRA, LoHa and LoKr, and "
            "other models than Stable Diffusion 1.x, 2.x and XL are not supported."
        )
    if incomplete := [layer for layer, keys in layers.items() if not {"up", "down"} <= keys.keys()]:
        raise FormatError(f"'{file.path}': {len(incomplete)} layers lack a factor ({', '.join(incomplete[:3])}).")
    return layers


def _check_shapes(file: OpenFile, layer: str, keys: Mapping[str, str]) -> None:
    down, up = file.shapes[keys["down"]], file.shapes[keys["up"]]
    alpha = file.shapes[keys["alpha"]] if "alpha" in keys else ()
    fits = len(up) == len(down) in (2, 4) and up[1] == down[0]
    if not fits or math.prod([*up[2:], *down[2:], *alpha]) != 1:
        raise FormatError(
            f"'{file.path}': the factors of {layer} have shapes {up} and {down}; only linear layers and convolutions "
            "with a 1x1 kernel can be imported, as (O, Q) and (Q, I)."
        )
