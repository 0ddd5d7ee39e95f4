"""The weights of a base as its files store them, before they are cast to the dtype in which it was opened.

Shapes: O out_features, I in_features.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusion.layer_names import canonical
from fusion.models.layer_sites import Site, components, matrix
from fusion.models.pipeline import Pipeline, uncompiled

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
        for path, key in self._keys.get(name, ()):
            with safe_open(path, framework="pt", device="cpu") as file:
                stored: Tensor = file.get_tensor(key).flatten(1)
            if stored.shape == weight.shape and torch.equal(stored.to(weight.dtype), weight):
                return stored.float()
        self.unknown.append(name)
        return weight.float()

    @cached_property
    def _keys(self) -> dict[str, list[tuple[Path, str]]]:
        """Canonical layer name -> files that hold its weight, and the key there."""
        keys: dict[str, list[tuple[Path, str]]] = {}
        for component, module in components(self._pipe).items():
            source = getattr(uncompiled(module).config, "_name_or_path", "")  # where from_pretrained found it
            for path in _files(Path(source)) if source else ():
                for key in _shapes(path):
                    layer = canonical(component, key.removesuffix(".weight"))
                    keys.setdefault(layer, []).append((path, key))
        return keys


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
