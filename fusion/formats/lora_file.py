"""Adapter files of other programs: what all their forms share. How a form names layers is in its own file.

Shapes: O out_features, I in_features, Q rank of a delta.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusion.adapters import IMPORTED_TYPES
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept, Provenance
from fusion.adapters.imported import ImportedLayer
from fusion.adapters.layer import AdapterLayer
from fusion.adapters.loha import LohaLayer
from fusion.adapters.lokr import LokrLayer
from fusion.adapters.lora import LoraLayer
from fusion.errors import FormatError
from fusion.formats.metadata import HASHES, foreign_base, kohya_entries, modelspec, thumbnail_entries
from fusion.formats.safetensors_file import OpenFile, write_file
from fusion.layer_names import is_importable, kernel_of
from fusion.spectral.delta import Delta

if TYPE_CHECKING:
    from PIL import Image

# Endings of keys, in every form, and the tensors of the layer types that they are.
_PARTS = {
    **dict.fromkeys(("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys(("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"), "up"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"), "dora_scale"),
    "lora_mid.weight": "mid",
    **{name: name for name in (*LohaLayer.factors, *LokrLayer.factors)},
    "alpha": "alpha",
}
_MAGNITUDE = "lora_magnitude_vector"  # PEFT's name of a DoRA's norms of outputs, in any shape
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(clip_[lg])")  # an embedding by OneTrainer: its word, the text encoder


@dataclass(frozen=True)
class LoraForm:
    """How one family of programs writes the keys of a LoRA."""

    title: str
    recognises: Callable[[str], bool]  # whether a key shows that a file is in this form
    layer: Callable[[str], str | None]  # a key's beginning -> layer name; None: not a name in this form
    scale: Callable[[OpenFile, str, int], float]  # file, layer name, rank -> scale where a layer has no alpha
    export: "ExportForm | None" = None
    ending: Callable[[str], str] = lambda key: key  # a key with one of the endings above


@dataclass(frozen=True)
class ExportForm:
    """How a form is written."""

    sdxl: str  # ModelSpec's implementation: whose layer names these are for SDXL
    stem: Callable[[str, str | None], str]  # layer name, family of the base -> its keys' beginning
    up: str  # endings of the keys
    down: str
    kinds: bool  # whether it holds the other kinds of layers, and an alpha; a form without has a scale of 1


def no_scale(_file: OpenFile, _layer: str, _rank: int) -> float:
    return 1.0


def write_lora(
    form: ExportForm, info: AdapterInfo, deltas: Mapping[str, Delta], path: Path, dtype: str,
    imported: Mapping[str, ImportedLayer] = MappingProxyType({}), words: Iterable[str] = (),
    picture: "Image.Image | None" = None,
) -> None:  # fmt: skip
    """Write changes of whole layers as a LoRA: without alpha, or with alpha = the largest rank.

    `imported` layers are written as the kinds they are. `words` and `picture` are for other programs' lists of models.
    """
    family = info.base.family if info.base else None
    rank = max([1, *(delta.rank for delta in deltas.values())])
    tensors: dict[str, Tensor] = {}
    for layer, delta in deltas.items():
        stem, kernel = form.stem(layer, family), kernel_of(layer, family)
        # One alpha for all layers: diffusers loses alphas that differ. Where ranks differ, `up` makes up for it.
        factors = balanced(delta * (delta.rank / rank) if form.kinds else delta)
        tensors[f"{stem}.{form.down}"] = with_kernel(factors.down, kernel)  # (Q, I)
        tensors[f"{stem}.{form.up}"] = factors.up.reshape(*factors.up.shape, *(1 for _ in kernel))  # (O, Q)
        if form.kinds:
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    endings = {"up": form.up, "down": form.down, "mid": "lora_mid.weight"}
    for layer, source in imported.items():
        for part, tensor in source.state_dict().items():
            key = f"{form.stem(layer, family)}.{endings.get(part, part)}"
            tensors[key] = _in_writers_shape(part, tensor, kernel_of(layer, family), source)
    spec = modelspec(info, "lora", implementation=form.sdxl if family == "sdxl" else "diffusers")
    shown = thumbnail_entries(picture) if picture else {}
    metadata = {"format": "pt", **spec, **kohya_entries(info, rank, words), **shown}
    write_file(path, tensors, metadata, dtype, hashes=HASHES)


def _in_writers_shape(part: str, tensor: Tensor, kernel: tuple[int, ...], source: ImportedLayer) -> Tensor:
    """A factor with the dimensions that LyCORIS gives it in a convolution."""
    ones = tuple(1 for _ in kernel)
    if part == "down":
        return with_kernel(tensor, ones if source.state_dict().get("mid") is not None else kernel)
    return tensor.reshape(*tensor.shape, *ones) if part in ("up", "dora_scale") else tensor


def with_kernel(down: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """(Q, I·K) as (Q, I, k, k); as it is for a linear layer."""
    return down.reshape(len(down), -1, *kernel) if kernel else down


def balanced(delta: Delta) -> Delta:
    """The same ΔW, with equally long factors, so that neither loses bits to float16's narrow range.

    Every term of the sum is scaled by a power of two, which is exact in floating point.
    """
    ratio = torch.linalg.vector_norm(delta.down, dim=1) / torch.linalg.vector_norm(delta.up, dim=0)  # (Q,)
    exponent = (ratio.log2() / 2).round().nan_to_num(0, 0, 0)
    return Delta(torch.ldexp(delta.up, exponent), torch.ldexp(delta.down, -exponent[:, None]))


def read_lora(file: OpenFile, form: LoraForm) -> Adapter:
    """Another program's file as an ungated adapter: of type lora with the scale folded into `up`, or of other kinds.

    Raises FormatError for any key that is not understood: nothing is skipped.
    """
    layers, bundled = _grouped(file, form)
    branches: dict[str, dict[str, AdapterLayer]] = {}
    for layer, keys in layers.items():
        kind = _kind(file, layer, keys)
        branches.setdefault(kind, {})[layer] = _layer(file, form, layer, keys, kind)
    name = file.path.parent.name if file.path.stem == "adapter_model" else file.path.stem  # a folder by PEFT
    provenance = Provenance(
        f"import of a {form.title} LoRA", settings={"merged_from": file.metadata.get("modelspec.merged_from", "")}
    )
    concepts, rows = _concepts(file, bundled)
    widths = {name: layer.shape[1] for named in branches.values() for name, layer in named.items()}
    convolutions = {layer for layer, keys in layers.items() if any(len(file.shapes[key]) == 4 for key in keys.values())}
    base = foreign_base(file.metadata, widths, convolutions)
    titles = {kind: name if len(branches) == 1 else f"{name}-{kind}" for kind in branches}
    return Adapter(
        AdapterInfo(name, base, concepts, provenance),
        tuple(Branch(titles[kind], kind, named) for kind, named in branches.items()),
        rows,
    )


def _grouped(file: OpenFile, form: LoraForm) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Layer name -> part -> key, of every key of the file; and of bundled embeddings, word -> text encoder -> key."""
    layers: dict[str, dict[str, str]] = {}
    bundled: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in file.shapes:
        if match := _BUNDLED.fullmatch(key):
            bundled.setdefault(match[1], {})[_ENCODERS[match[2]]] = key
            continue
        normal = form.ending(key)
        ending = next((ending for ending in _PARTS if normal.endswith(f".{ending}")), "")
        layer = form.layer(normal.removesuffix(f".{ending}")) if ending else None
        if layer is None or not is_importable(layer) or _PARTS[ending] in layers.get(layer, {}):
            unknown.append(key)
        else:
            layers.setdefault(layer, {})[_PARTS[ending]] = key
    if unknown:
        raise FormatError(
            f"'{file.path}' cannot be imported as a {form.title} LoRA: {len(unknown)} of its {len(file.shapes)} keys "
            f"are not those of a plain LoRA, LoCon, LoHa, LoKr or DoRA ({', '.join(unknown[:3])}) for Stable Diffusion "
            "1.x, 2.x or XL."
        )
    return layers, bundled


def _kind(file: OpenFile, layer: str, keys: Mapping[str, str]) -> str:
    """The type of a layer by its tensors."""
    parts = keys.keys() - {"alpha", "dora_scale"}
    if parts == {"up", "down"} and "dora_scale" not in keys:
        return "lora"
    for kind, type_ in IMPORTED_TYPES.items():
        if parts and parts <= set(type_.factors):
            return kind
    names = ", ".join(keys[part].removeprefix(f"{layer}.") for part in keys)
    raise FormatError(f"'{file.path}': {layer} has {names}: no complete LoRA, LoCon, LoHa, LoKr or DoRA.")


def _layer(file: OpenFile, form: LoraForm, layer: str, keys: Mapping[str, str], kind: str) -> AdapterLayer:
    """A layer of the type `kind`."""
    if kind in ("lora", "locon"):
        _check_factors(file, layer, keys)
    parts = {part: file.tensor(key) for part, key in keys.items() if part != "alpha"}
    for part in ("up", "down"):
        if part in parts:
            parts[part] = parts[part].flatten(1)  # (O, Q), (Q, I·K)
    if _MAGNITUDE in keys.get("dora_scale", ""):
        parts["dora_scale"] = parts["dora_scale"].reshape(-1, 1)
    elif "dora_scale" in parts and parts["dora_scale"].dim() > 1:
        parts["dora_scale"] = parts["dora_scale"].flatten(1)
    rank = _rank(parts)
    if "alpha" in keys:  # where no factor of a LoKr is of low rank, LyCORIS writes an alpha that does nothing
        alpha = float(file.tensor(keys["alpha"]).reshape(())) if rank else 1.0
    else:
        alpha = form.scale(file, layer, rank) * (rank or 1)
    if kind == "lora":
        scale = alpha / max(rank, 1)
        return LoraLayer(parts["up"] if scale == 1 else parts["up"].float() * scale, parts["down"])
    try:
        return IMPORTED_TYPES[kind].from_tensors({**parts, "alpha": torch.tensor(alpha)})
    except KeyError as missing:
        raise FormatError(f"'{file.path}': layers lack a factor ({layer}.{missing.args[0]}).") from None
    except ValueError as error:
        raise FormatError(f"'{file.path}': {layer} is no {kind}: {error}.") from None


def _rank(parts: Mapping[str, Tensor]) -> int:
    """What alpha is divided by; 0 where no factor is of low rank."""
    names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((len(parts[name]) for name in names if name in parts), 0)


def _check_factors(file: OpenFile, layer: str, keys: Mapping[str, str]) -> None:
    if not {"up", "down"} <= keys.keys():
        raise FormatError(f"'{file.path}': layers lack a factor ({layer}).")
    down, up = file.shapes[keys["down"]], file.shapes[keys["up"]]
    alpha = file.shapes[keys["alpha"]] if "alpha" in keys else ()
    kernel, cells = kernel_of(layer, None), math.prod(down[2:])
    fits = len(up) == len(down) in (2, 4) and up[1] == down[0]
    if not fits or math.prod([*up[2:], *alpha]) != 1 or cells not in (1, math.prod(kernel)):
        raise FormatError(
            f"'{file.path}': the factors of {layer} have shapes {up} and {down}; (O, Q) and (Q, I) are needed, of a "
            "convolution (O, Q, 1, 1) and (Q, I, k, k) with its kernel."
        )


def _concepts(
    file: OpenFile, bundled: Mapping[str, Mapping[str, str]]
) -> tuple[tuple[Concept, ...], dict[str, dict[str, Tensor]]]:
    """The concepts of bundled embeddings: their words in angle brackets, in the letters that a token may have."""
    concepts: list[Concept] = []
    rows: dict[str, dict[str, Tensor]] = {}
    for word, keys in bundled.items():
        letters = re.sub(r"[^a-z0-9_-]+", "-", word.lower()).strip("-")
        token = f"<{letters or file.path.stem}>"
        rows[token] = {component: file.tensor(key) for component, key in keys.items()}
        shapes = {tuple(row.shape)[:-1] for row in rows[token].values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise FormatError(
                f"'{file.path}': the embedding of {word} has shapes {sorted(shapes)}, not (vectors, dim)."
            )
        concepts.append(Concept(token, vectors=next(iter(shapes))[0]))
    return tuple(concepts), rows
