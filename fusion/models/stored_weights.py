"""The weights of a base as its files store them, before they are cast to the dtype in which it was opened.

Shapes: O out_features, I in_features.
"""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusion.layer_names import canonical
from fusion.models.layer_sites import Site, components, matrix
from fusion.models.pipeline import Pipeline, uncompiled

# Where checkpoint files of SD 1.x, 2.x and XL have the text encoders, in transformers' names and in OpenCLIP's.
_CLIP = {"text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")}
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}
_OPEN_CLIP_LAYERS = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
Part = Callable[[Tensor], Tensor]
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


class StoredWeights:
    """The weights of a pipeline's layers in float32, from the base's files where these are known."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self.unknown: list[str] = []  # layers of which only the cast weight is there

    def matrix(self, name: str, site: Site) -> Tensor:
        """The weight (O, I) of the layer `name` in float32, on the CPU.

        A weight in half precision is read from the files that its component was opened from, if what they hold gives
        the same when it is cast; else it is the pipeline's own, and the layer is listed in `unknown`.
        """
        weight = matrix(site).cpu()
        if weight.dtype == torch.float32:
            return weight
        for path, key, part in self._keys.get(name, ()):
            with safe_open(path, framework="pt", device="cpu") as file:
                stored: Tensor = part(file.get_tensor(key).flatten(1))
            if stored.shape == weight.shape and torch.equal(stored.to(weight.dtype), weight):
                return stored.float()
        self.unknown.append(name)
        return weight.float()

    @cached_property
    def _keys(self) -> dict[str, list[tuple[Path, str, Part]]]:
        """Canonical layer name -> files that hold its weight, the key there, and the part of that tensor."""
        keys: dict[str, list[tuple[Path, str, Part]]] = {}
        base = Path(self._pipe.config.get("_name_or_path") or "")
        for component, module in components(self._pipe).items():
            source = getattr(uncompiled(module).config, "_name_or_path", "")  # where from_pretrained found it
            names = [
                (path, key, key, _whole) for path in (_files(Path(source)) if source else ()) for key in _shapes(path)
            ]
            if base.suffix == ".safetensors" and not source:
                names = [(base, *entry) for entry in _single_file_keys(base, component, uncompiled(module))]
            for path, name, key, part in names:
                keys.setdefault(canonical(component, name.removesuffix(".weight")), []).append((path, key, part))
        return keys


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _third(number: int) -> Part:
    return lambda tensor: tensor.chunk(3)[number]


def _single_file_keys(path: Path, component: str, module: Any) -> list[tuple[str, str, Part]]:
    """Names of a component's tensors in diffusers, their keys in a checkpoint file, and which part of each it is."""
    shapes = _shapes(path)
    if component == "unet":
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        keys = {id(tensor): key for key, tensor in tensors.items()}
        converted = convert_ldm_unet_checkpoint(dict(tensors), dict(module.config))
        return [(name, keys[id(tensor)], _whole) for name, tensor in converted.items() if id(tensor) in keys]
    entries: list[tuple[str, str, Part]] = []
    for key in shapes:
        for prefix in _CLIP.get(component, ()):
            if key.startswith(prefix):
                entries.append((key.removeprefix(prefix), key, _whole))
        rest = key.removeprefix(_OPEN_CLIP[component])
        if rest == "text_projection":
            entries.append(("text_projection.weight", key, torch.t))
        elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._]weight", rest):
            layer, inside = f"encoder.layers.{match[1]}", match[2]
            if inside == "attn.in_proj":
                entries += [(f"{layer}.self_attn.{name}_proj", key, _third(i)) for i, name in enumerate("qkv")]
            elif inside in _OPEN_CLIP_LAYERS:
                entries.append((f"{layer}.{_OPEN_CLIP_LAYERS[inside]}", key, _whole))
    return entries


def stored_parameters(base: Path) -> int:
    """How many parameters the safetensors files of a base hold, a folder or one file; one variant of each component."""
    variants: dict[tuple[Path, str], int] = {}
    for path in [base] if base.is_file() else (file for folder in sorted(base.glob("*/")) for file in _files(folder)):
        variant = path.parent, _SHARD.sub("", path.stem)
        count = sum(torch.Size(shape).numel() for shape in _shapes(path).values())
        variants[variant] = variants.get(variant, 0) + count
    largest: dict[Path, int] = {}
    for (component, _), count in variants.items():
        largest[component] = max(count, largest.get(component, 0))
    return sum(largest.values())


def stored_dtype(base: Path, variant: str | None = None) -> torch.dtype | None:
    """The dtype in which the files of a base, a folder or one file, store most weights of the UNet.

    None where it is none in which layers compute (float8), or not known.
    """
    files = [base] if base.is_file() else [
        path for path in _files(base / "unet") if _variant(path) == (variant or "")
    ]  # fmt: skip
    counts: dict[str, int] = {}
    for path in files:
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if path != base or key.startswith("model.diffusion_model."):
                    part = file.get_slice(key)
                    counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return dtypes.get(max(counts, key=counts.__getitem__, default=""))


def stored_variants(base: Path) -> list[str]:
    """The variants in which alone a folder stores the UNet; none where there are files without one."""
    variants = {_variant(path) for path in _files(base / "unet")}
    return [] if "" in variants else sorted(variants)


def _variant(path: Path) -> str:
    """`fp16` of name.fp16.safetensors and name.fp16-00001-of-00002.safetensors."""
    return _SHARD.sub("", path.stem).partition(".")[2]


def _files(folder: Path) -> Iterable[Path]:
    """The safetensors files in a folder, variants (name.fp16.safetensors) last."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: (path.name.count("."), path.name))


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a file; none for a damaged one, of which opening the base says what is wrong."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return {}
