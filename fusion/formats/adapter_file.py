"""Our adapter file: self-contained, so that neither the base nor an SVD nor a GPU is needed to read it.

    <layer name>.<tensor>                   an adapter of one branch: trained tensors and the slice's basis U, S, V
    <branch>.<layer name>.<tensor>          several branches, counted from 0
    <text encoder>.token.<dog>              embeddings of a concept's token, (vectors, dim)

Metadata (strings, nested ones JSON): format, format_version, adapter (a list of branches), base, concepts,
provenance, name, and ModelSpec's entries. Types come from the metadata, never from tensor names.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Json
from torch import Tensor

from fusion.adapters import IMPORTED_TYPES, LAYER_TYPES
from fusion.adapters.adapter import TOKEN, Adapter, AdapterInfo, BaseInfo, Branch, Concept, DigestCache, Provenance
from fusion.adapters.layer import AdapterLayer
from fusion.config import StrictModel
from fusion.errors import FormatError, FusionError, UnknownName, closest
from fusion.formats import LORA_FORMS
from fusion.formats.hub_file import local_file
from fusion.formats.lora_file import read_lora
from fusion.formats.metadata import modelspec
from fusion.formats.safetensors_file import opened, write_file
from fusion.layer_names import LAYER_NAME
from fusion.output_files import check_output
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum

FORMAT, VERSION = "spectral-adapter", "1"

_ROWS = re.compile(rf"(text_encoder(?:_2)?)\.token\.({TOKEN.pattern})")
MAX_DIRECTION = 2**16  # no weight of any model has more
MAX_ENTRIES = 1000  # branches, concepts

Keys = dict[str, dict[str, str]]  # layer name -> tensor name -> key in the file, or token -> text encoder -> key
Shapes = Mapping[str, tuple[int, ...]]  # key -> shape


@dataclass(frozen=True)
class _BranchEntry:
    """A Branch in the metadata."""

    name: str
    type: str
    slices: tuple[tuple[int, int, int], ...]  # start, rank, step
    targets: tuple[str, ...]
    gate: tuple[str, ...]
    strength: float


class _Entries(StrictModel):
    """The metadata that make an adapter."""

    name: str
    base: Json[BaseInfo | None]
    concepts: Json[tuple[Concept, ...]]
    provenance: Json[Provenance]
    adapter: Json[tuple[_BranchEntry, ...]]


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds, read from its header alone."""

    path: Path
    size: int  # bytes
    info: AdapterInfo
    branches: tuple[Branch, ...]  # their tensors are on the meta device: shapes without values
    slices: tuple[SpectralSlice, ...]


def save(adapter: Adapter, path: str | os.PathLike[str], dtype: str = "float16", *, overwrite: bool = False) -> None:
    """Write an adapter, whole or not at all; `dtype` is "float16", "bfloat16" or "float32".

    An adapter of the same tokens is replaced, other files with `overwrite` only. Raises OutputError for a path that
    cannot be written, FormatError for values that are not finite or do not fit `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    for number, branch in enumerate(adapter.branches):
        prefix = f"{number}." if len(adapter.branches) > 1 else ""
        for layer_name, layer in branch.layers.items():
            tensors |= {f"{prefix}{layer_name}.{part}": tensor for part, tensor in layer.state_dict().items()}
    for token, rows in adapter.tokens.items():
        tensors |= {f"{component}.token.{token}": row for component, row in rows.items()}
    info = adapter.info
    branches = [
        _BranchEntry(b.name, b.type, tuple((s.start, s.rank, s.step) for s in b.slices), b.targets, b.gate, b.strength)
        for b in adapter.branches
    ]
    entries = _Entries.model_construct(
        name=info.name, base=info.base, concepts=info.concepts, provenance=info.provenance, adapter=tuple(branches)
    )
    metadata = {"format": FORMAT, "format_version": VERSION, **entries.model_dump(round_trip=True)}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    _layout(Path(path), metadata, shapes)  # never write what load would refuse
    size = sum(tensor.numel() for tensor in tensors.values()) * (4 if dtype == "float32" else 2)
    check_adapter_output(path, [concept.token for concept in info.concepts], size=size, overwrite=overwrite)
    write_file(path, tensors, metadata | modelspec(info, FORMAT), dtype)


def check_adapter_output(
    path: str | os.PathLike[str], tokens: Iterable[str], *, size: int = 0, overwrite: bool = False
) -> Path:
    """Raise OutputError now for a path where an adapter of these tokens could not be saved later."""

    def foreign(existing: Path) -> str:
        try:
            concepts = read_info(existing).info.concepts
        except FusionError:
            return "it is no adapter of this program, or a damaged one"
        known = [concept.token for concept in concepts]
        return "" if known and set(known) == set(tokens) else f"it is the adapter of {' '.join(known) or 'no token'}"

    return check_output(path, endings=(".safetensors",), size=size, foreign=foreign, overwrite=overwrite)


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter: our own file, or a diffusers or kohya LoRA, which becomes an ungated adapter of type lora.

    A path, or the id of a repository on the Hub, `user/dog` or `user/dog@revision`.
    Tensors keep the dtype they are stored in; the mathematics raises them to float32. Its digest is computed once.
    Raises FormatError for anything that is not exactly what the metadata promise, for other files, and for a LoRA of
    which a single key is not understood; UnknownName for an unknown adapter type.
    """
    with opened(local_file(path)) as file:
        if file.metadata.get("format") == FORMAT:
            layout = _layout(file.path, file.metadata, file.shapes)  # refuses before any tensor is read
            return replace(layout.adapter(file.tensor), digest_cache=DigestCache())
        keys = list(file.shapes)
        for form in LORA_FORMS.values():
            if any(map(form.recognises, keys)):
                return replace(read_lora(file, form), digest_cache=DigestCache())
        raise FormatError(
            f"'{file.path}' holds no adapter, but {len(keys)} tensors such as {', '.join(keys[:3]) or 'none'}. "
            "Whole models are opened as a base, textual inversions by diffusers' load_textual_inversion."
        )


def read_info(path: str | os.PathLike[str]) -> AdapterFile:
    """What an adapter file holds, checked as by `load`, except for the values of its tensors, which are not read."""
    with opened(local_file(path)) as file:
        layout = _layout(file.path, file.metadata, file.shapes)
        adapter = layout.adapter(lambda key: torch.empty(file.shapes[key], device="meta"))
    return AdapterFile(file.path, file.path.stat().st_size, adapter.info, adapter.branches, adapter.slices)


@dataclass(frozen=True)
class _Layout:
    """What every tensor of a file is for."""

    outline: Adapter  # its branches without layers, its tokens without embeddings
    layers: list[Keys]  # of each branch
    rows: Keys

    def adapter(self, tensor: Callable[[str], Tensor]) -> Adapter:
        """The adapter, with the tensors that `tensor` gives for keys of the file."""
        branches = [
            replace(branch, layers={name: _layer(branch, parts, tensor) for name, parts in layers.items()})
            for branch, layers in zip(self.outline.branches, self.layers, strict=True)
        ]
        rows = {token: {name: tensor(key) for name, key in keys.items()} for token, keys in self.rows.items()}
        return Adapter(self.outline.info, tuple(branches), rows)


def _layer(branch: Branch, parts: Mapping[str, str], tensor: Callable[[str], Tensor]) -> AdapterLayer:
    return LAYER_TYPES[branch.type].from_tensors({part: tensor(key) for part, key in parts.items()})


def _layout(path: Path, metadata: Mapping[str, str], shapes: Shapes) -> _Layout:
    """What a file holds, with every claim of its header checked against every other."""
    if metadata.get("format") != FORMAT:
        raise FormatError(f"'{path}' is no spectral adapter file: its metadata do not say format = {FORMAT}.")
    if (version := metadata.get("format_version", "")) != VERSION:
        raise FormatError(
            f"'{path}' has format_version {version[:20]!r}, but {VERSION} is read; a newer one needs an update."
        )
    try:
        entries = _Entries.model_validate({key: metadata[key] for key in _Entries.model_fields if key in metadata})
        if max(len(entries.adapter), len(entries.concepts)) > MAX_ENTRIES:
            raise FormatError(f"it has more than {MAX_ENTRIES} branches or concepts.")
        layers, rows = _grouped(entries.adapter, shapes)
        sizes: dict[str, dict[str, int]] = {}
        for entry, keys in zip(entries.adapter, layers, strict=True):
            _check_layers(entry, keys, shapes, sizes)
        info = AdapterInfo(entries.name, entries.base, entries.concepts, entries.provenance)
        _check_rows(info, rows, shapes)
        branches = [
            Branch(e.name, e.type, {}, tuple(SpectralSlice(*s) for s in e.slices), e.targets, e.gate, e.strength)
            for e in entries.adapter
        ]
        return _Layout(Adapter(info, tuple(branches), {}), layers, rows)
    except UnknownName as error:
        raise UnknownName(f"'{path}': {error}") from error
    except FusionError as error:
        raise FormatError(f"'{path}' is no sound adapter file: {error}") from error


def _grouped(entries: Sequence[_BranchEntry], keys: Iterable[str]) -> tuple[list[Keys], Keys]:
    """Every key to its branch and layer, or to its token; FormatError names those that belong nowhere."""
    numbers = {str(number): number for number in range(len(entries))}
    layers: list[Keys] = [{} for _ in entries]
    rows: Keys = {}
    unexpected: list[str] = []
    for key in keys:
        number, _, name = key.partition(".") if len(entries) > 1 else ("0", "", key)
        if match := _ROWS.fullmatch(key):
            rows.setdefault(match[2], {})[match[1]] = key
        elif number in numbers and (match := _keys(entries[numbers[number]].type).fullmatch(name)):
            layers[numbers[number]].setdefault(match[1], {})[match[2]] = key
        else:
            unexpected.append(key[:120])
    if unexpected:
        raise FormatError(f"it has {len(unexpected)} unexpected tensors: {', '.join(unexpected[:3])}.")
    return layers, rows


def _check_layers(entry: _BranchEntry, layers: Keys, shapes: Shapes, weights: dict[str, dict[str, int]]) -> None:
    """A branch's layers have all their tensors, in shapes that fit each other.

    `weights`: layer name -> sizes O and I, in which all branches agree.
    """
    slices = [SpectralSlice(*numbers) for numbers in entry.slices]
    if len(slices) > MAX_ENTRIES or any(part.stop > MAX_DIRECTION for part in slices):
        raise FormatError(f"branch {entry.name!r} has over {MAX_ENTRIES} slices, or one beyond {MAX_DIRECTION}.")
    owned = sum(part.rank for part in slices) if LAYER_TYPES[entry.type].slice_of else 0
    for name, parts in layers.items():
        sizes = weights.get(name, {}) | ({"R": owned} if owned else {})
        if entry.type in IMPORTED_TYPES:
            weights[name] = _imported_sizes(entry.type, name, {part: shapes[key] for part, key in parts.items()}, sizes)
            continue
        for part, letters in tensor_shapes(entry.type).items():
            if part not in parts:
                raise FormatError(f"it lacks {name}.{part}.")
            shape = shapes[parts[part]]
            fits = len(shape) == len(letters)
            if not fits or any(sizes.setdefault(x, n) != n for x, n in zip(letters, shape, strict=True)):
                raise FormatError(f"{name}.{part} has shape {shape}, which does not fit its layer {sizes}.")
        weights[name] = {letter: n for letter, n in sizes.items() if letter != "R"}
    # A merged branch has the slices of several adapters, each of which fits that adapter's layers.
    capacity = max((min(weights[name]["O"], weights[name]["I"]) for name in layers), default=0)
    for part in slices:
        if part.stop > capacity:
            raise FormatError(f"branch {entry.name!r} has slice {part}, but its layers {capacity} directions at most.")


def _imported_sizes(kind: str, name: str, shapes: Shapes, sizes: dict[str, int]) -> dict[str, int]:
    """O and I of an imported layer, which should be `sizes` where these are known."""
    try:
        O, I = IMPORTED_TYPES[kind].sizes(shapes)  # noqa: E741 (the letters of the shape legend)
    except KeyError as missing:
        raise FormatError(f"it lacks {name}.{missing.args[0]}.") from None
    except ValueError as error:
        raise FormatError(f"{name} is no {kind}: {error}.") from None
    if sizes and sizes != {"O": O, "I": I}:
        raise FormatError(f"{name} has shape ({O}, {I}), which does not fit its layer {sizes}.")
    return {"O": O, "I": I}


def _check_rows(info: AdapterInfo, rows: Keys, shapes: Shapes) -> None:
    """Every concept has its embeddings, as many as it says, and nothing else has."""
    vectors = {concept.token: concept.vectors for concept in info.concepts}
    if unmatched := sorted(vectors.keys() ^ rows.keys()):
        token = unmatched[0]
        raise FormatError(f"{token} has {'no embedding' if token in vectors else 'an embedding but no concept'}.")
    for token, keys in rows.items():
        for shape in (shapes[key] for key in keys.values()):
            if len(shape) != 2 or shape[0] != vectors[token]:
                raise FormatError(f"{token} has {vectors[token]} vectors, but an embedding {shape}.")


@lru_cache(maxsize=64)
def tensor_shapes(kind: str) -> dict[str, str]:
    """The tensors of an adapter type with their shapes in letters: {"dU": "OR", "dS": "R", …}; of imported types, "".

    Found by a toy layer of O = 5, I = 7, R = 3, so that a new type needs no line here. Without an SVD.
    """
    if kind not in LAYER_TYPES:
        known = f"{closest(kind, LAYER_TYPES)} There are: {', '.join(LAYER_TYPES)}."
        raise UnknownName(f"no adapter type '{kind[:40]}'{known}")
    if kind in IMPORTED_TYPES:
        return dict.fromkeys(IMPORTED_TYPES[kind].names(), "")
    toy = Spectrum(torch.zeros(5, 3), torch.zeros(3), torch.zeros(7, 3))
    layer = LAYER_TYPES[kind].fresh(torch.zeros(5, 7), SpectralSlice(0, 3), spectrum=toy)
    letters = {5: "O", 7: "I", 3: "R"}
    return {name: "".join(letters[n] for n in tensor.shape) for name, tensor in layer.state_dict().items()}


@lru_cache(maxsize=64)
def _keys(kind: str) -> re.Pattern[str]:
    """A layer name of the model and a tensor name of the type."""
    return re.compile(rf"({LAYER_NAME})\.({'|'.join(map(re.escape, tensor_shapes(kind)))})")
