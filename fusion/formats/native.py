"""The toolkit's own adapter file: self-contained, so that no base, SVD or GPU is needed to use what is in it.

    <layer name>.<tensor>                   an adapter of one branch: trained tensors and the slice's basis U, S, V
    <branch>.<layer name>.<tensor>          several branches, counted from 0
    <text encoder>.token.<dog>              embeddings of a concept's token, (vectors, dim)

Metadata (strings, nested ones JSON): format, format_version, adapter (a list of branches), base, concepts,
provenance, name, and ModelSpec's entries. Types come from the metadata, never from tensor names.

Shapes: O out_features, I in_features, R slice length.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import TOKEN, Adapter, AdapterInfo, BaseInfo, Branch
from fusion.errors import FormatError, FusionError, UnknownName, closest
from fusion.formats.metadata import fields, from_json, info_entries, modelspec, parse_info, strings, to_json, typed
from fusion.formats.safetensors_file import Header, TensorInfo, cast, opened, write_file
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum

FORMAT, VERSION = "spectral-adapter", 1

_BRANCH = {"name": str, "type": str, "slices": list, "targets": list, "gate": list, "strength": float}
_LAYER = re.compile(r"(unet|text_encoder|text_encoder_2)(\.[A-Za-z0-9_]+)+")
_ROWS = re.compile(rf"(text_encoder(?:_2)?)\.token\.({TOKEN.pattern})")
_FURTHEST = 2**16  # no weight of any model has more directions


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file says, read from its header alone."""

    path: Path
    info: AdapterInfo
    branches: tuple[Branch, ...]  # without their layers
    layer_names: tuple[str, ...]
    size: int  # bytes

    @property
    def base(self) -> BaseInfo | None:
        return self.info.base

    @property
    def slices(self) -> tuple[SpectralSlice, ...]:
        return tuple(part for branch in self.branches for part in branch.slices)


@dataclass(frozen=True)
class _Layout:
    """Where an adapter's parts stand in its file."""

    info: AdapterInfo
    branches: tuple[Branch, ...]
    layers: tuple[dict[str, dict[str, str]], ...]  # per branch: layer name -> tensor -> key
    rows: dict[str, dict[str, str]]  # token -> component -> key


def save(adapter: Adapter, path: str | os.PathLike[str], dtype: str = "float16") -> None:
    """Write an adapter, whole or not at all; `dtype` is "float16", "bfloat16" or "float32".

    Raises FormatError for values that are not finite or do not fit `dtype`, and for a path that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for number, branch in enumerate(adapter.branches):
        for layer_name, layer in branch.layers.items():
            for tensor_name, tensor in layer.state_dict().items():
                tensors[f"{_prefix(number, len(adapter.branches))}{layer_name}.{tensor_name}"] = tensor
    for token, rows in adapter.tokens.items():
        tensors |= {f"{component}.token.{token}": row for component, row in rows.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "adapter": to_json([_described(branch) for branch in adapter.branches]),
        **info_entries(adapter.info),
        **modelspec(adapter.info, FORMAT),
    }
    made = cast(tensors, dtype)
    infos = {name: TensorInfo("", tuple(tensor.shape)) for name, tensor in made.items()}
    _survey(Path(path), Header(metadata, infos))  # never write what load would refuse
    write_file(path, made, metadata)


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter; tensors keep the dtype they are stored in, the mathematics raises them to float32.

    Raises FormatError for anything that is not exactly what the metadata promise, UnknownName for an unknown type.
    """
    with opened(path) as file:
        layout = _survey(file.path, file.header)
        tensors = {name: file.tensor(name) for name in file.header.tensors}
    branches = tuple(
        replace(
            branch,
            layers={
                name: ADAPTERS[branch.type].from_tensors({part: tensors[key] for part, key in keys.items()})
                for name, keys in layers.items()
            },
        )
        for branch, layers in zip(layout.branches, layout.layers, strict=True)
    )
    rows = {token: {c: tensors[key] for c, key in keys.items()} for token, keys in layout.rows.items()}
    return Adapter(layout.info, branches, rows)


def read_info(path: str | os.PathLike[str]) -> AdapterFile:
    """What a file says of itself, checked like `load` but for the values. Reads no tensor."""
    with opened(path) as file:
        layout, size = _survey(file.path, file.header), file.path.stat().st_size
    names = tuple(dict.fromkeys(name for layers in layout.layers for name in layers))
    return AdapterFile(file.path, layout.info, layout.branches, names, size)


def is_native(metadata: Mapping[str, str]) -> bool:
    return metadata.get("format") == FORMAT


def _prefix(number: int, branches: int) -> str:
    return "" if branches == 1 else f"{number}."


def _described(branch: Branch) -> dict[str, Any]:
    return {
        "name": branch.name,
        "type": branch.type,
        "slices": [part.to_json() for part in branch.slices],
        "targets": list(branch.targets),
        "gate": list(branch.gate),
        "strength": branch.strength,
    }


def _survey(path: Path, header: Header) -> _Layout:
    """Where everything stands, with every claim of the header checked against every other."""
    metadata = header.metadata
    if not is_native(metadata):
        raise FormatError(f"'{path}' is no spectral adapter file: its metadata do not say format = {FORMAT}.")
    _check_version(path, metadata.get("format_version", ""))
    try:
        info = parse_info(metadata)
        branches = tuple(_parse_branch(value) for value in typed(from_json(metadata, "adapter"), list, "adapter"))
        Adapter(info, branches, {})  # distinct branch names, gates that have concepts
        layers, rows = _assign(branches, header.tensors)
        _check_shapes(branches, layers, header.tensors)
        _check_rows(info, rows, header.tensors)
    except UnknownName as error:
        raise UnknownName(f"'{path}': {error}") from error
    except FusionError as error:
        raise FormatError(f"'{path}' is no sound adapter file: {str(error).rstrip('.')}.") from error
    return _Layout(info, branches, layers, rows)


def _check_version(path: Path, version: str) -> None:
    if not (version.isascii() and version.isdigit() and 0 < len(version) < 9):
        raise FormatError(f"'{path}' says format_version = {version[:20]!r}, which is no version.")
    if int(version) > VERSION:
        raise FormatError(
            f"'{path}' is of format version {version}, newer than this spectral-fusion reads ({VERSION}); update it."
        )


def _parse_branch(value: Any) -> Branch:
    found = fields(value, _BRANCH, "a branch")
    if found["type"] not in ADAPTERS:
        known = ", ".join(ADAPTERS)
        raise UnknownName(
            f"no adapter type '{found['type'][:40]}'{closest(found['type'], ADAPTERS)} There are: {known}."
        )
    slices = tuple(_parse_slice(part) for part in found["slices"])
    texts = {key: strings(found[key], f"{key} of a branch") for key in ("targets", "gate")}
    return Branch(found["name"], found["type"], {}, slices, **texts, strength=float(found["strength"]))


def _parse_slice(value: Any) -> SpectralSlice:
    numbers = [typed(number, int, "each number of a slice") for number in typed(value, list, "a slice")]
    if len(numbers) != 3 or any(not 0 <= number < _FURTHEST for number in numbers):
        raise FormatError(f"a slice should be three numbers start, rank, step, not {str(value)[:40]}")
    return SpectralSlice.from_json(numbers)


def _assign(
    branches: tuple[Branch, ...], tensors: Mapping[str, TensorInfo]
) -> tuple[tuple[dict[str, dict[str, str]], ...], dict[str, dict[str, str]]]:
    """Every key to its branch, layer and tensor, or to its token. FormatError lists what is left or lacking."""
    layers: tuple[dict[str, dict[str, str]], ...] = tuple({} for _ in branches)
    rows: dict[str, dict[str, str]] = {}
    strange: list[str] = []
    for key in tensors:
        if match := _ROWS.fullmatch(key):
            rows.setdefault(match[2], {})[match[1]] = key
        elif (place := _placed(key, branches)) is not None:
            number, layer_name, part = place
            layers[number].setdefault(layer_name, {})[part] = key
        else:
            strange.append(key)
    missing = [
        f"{_prefix(number, len(branches))}{layer_name}.{part}"
        for number, branch in enumerate(branches)
        for layer_name, parts in layers[number].items()
        for part in tensor_shapes(branch.type)
        if part not in parts
    ]
    if strange or missing:
        raise FormatError("; ".join([*_listed("it lacks", missing), *_listed("it has unexpected", strange)]))
    return layers, rows


def _placed(key: str, branches: tuple[Branch, ...]) -> tuple[int, str, str] | None:
    """Branch number, layer name and tensor name of a key."""
    number = "0"
    if len(branches) != 1:
        number, _, key = key.partition(".")
    if not (number.isascii() and number.isdigit() and len(number) < 6 and int(number) < len(branches)):
        return None
    for part in tensor_shapes(branches[int(number)].type):
        if key.endswith(f".{part}") and _LAYER.fullmatch(layer_name := key.removesuffix(f".{part}")):
            return int(number), layer_name, part
    return None


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(name[:120] for name in names[:3])}{more}"] if names else []


@lru_cache(maxsize=64)
def tensor_shapes(kind: str) -> dict[str, str]:
    """The tensors of an adapter type with their shapes in letters: {"dU": "OR", "dS": "R", …}.

    Read off a toy layer of O = 5, I = 7, R = 3, so that a new type needs no line here. No SVD: its basis is given.
    """
    toy = Spectrum(torch.zeros(5, 3), torch.zeros(3), torch.zeros(7, 3))
    layer = ADAPTERS[kind].fresh(torch.zeros(5, 7), SpectralSlice(0, 3), spectrum=toy)
    letters = {5: "O", 7: "I", 3: "R"}
    return {name: "".join(letters[n] for n in tensor.shape) for name, tensor in layer.state_dict().items()}


def _check_shapes(
    branches: tuple[Branch, ...], layers: tuple[dict[str, dict[str, str]], ...], tensors: Mapping[str, TensorInfo]
) -> None:
    """The letters of a layer stand for one number each, R for its slices' length; O and I agree between branches."""
    weights: dict[str, tuple[int, ...]] = {}
    for branch, places in zip(branches, layers, strict=True):
        owned = sum(part.rank for part in branch.slices) if ADAPTERS[branch.type].slice_of else 0
        for layer_name, keys in places.items():
            sizes = {"R": owned} if owned else {}
            for part, letters in tensor_shapes(branch.type).items():
                shape = tensors[keys[part]].shape
                good = len(shape) == len(letters) and all(
                    sizes.setdefault(letter, n) == n for letter, n in zip(letters, shape, strict=True)
                )
                if not good:
                    raise FormatError(f"{keys[part]} has shape {shape}, which does not fit its layer {sizes}")
            weight = tuple(sizes[letter] for letter in "OI" if letter in sizes)
            if weights.setdefault(layer_name, weight) != weight:
                raise FormatError(f"two branches take {layer_name} for {weights[layer_name]} and {weight}")


def _check_rows(info: AdapterInfo, rows: Mapping[str, Mapping[str, str]], tensors: Mapping[str, TensorInfo]) -> None:
    """Every concept has its embeddings, as many as it says, and nothing else has."""
    tokens = {concept.token: concept.vectors for concept in info.concepts}
    if odd := sorted(tokens.keys() ^ rows.keys()):
        raise FormatError(f"{odd[0]} has {'no embedding' if odd[0] in tokens else 'an embedding but no concept'}")
    if len(tokens) != len(info.concepts):
        raise FormatError("two concepts have one token")
    widths: dict[str, int] = {}
    for token, keys in rows.items():
        for component, key in keys.items():
            shape = tensors[key].shape
            if len(shape) != 2 or shape[0] != tokens[token] or widths.setdefault(component, shape[1]) != shape[1]:
                raise FormatError(f"{key} has shape {shape}, but {token} has {tokens[token]} vectors")
