"""Second moments in files, so that concepts can be fused later without being prompted again.

    <number>.own  <number>.free   the lower triangle of a moment, in two rows: its float32 and what that leaves out
    <number>.floor                its floor, likewise

Metadata: format, format_version, concepts (a list of: which layer has which number, and whether it acts everywhere).

Shapes: I in_features, P = I (I + 1) / 2.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Json
from torch import Tensor

from fusion.config import StrictModel
from fusion.errors import ConfigError, FormatError, FusionError
from fusion.formats.safetensors_file import OpenFile, opened, write_file
from fusion.output_files import check_output
from fusion.spectral.moments import Moment, Moments

FORMAT, VERSION = "spectral-moments", "1"


@dataclass(frozen=True)
class _Concept:
    layers: dict[str, str]
    everywhere: bool


class _Entries(StrictModel):
    concepts: Json[tuple[_Concept, ...]]


def save_moments(moments: Sequence[Moments], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the moments of some concepts; what layers share is written once. Precision is float64's, nearly.

    Moments in the file are replaced, anything else with `overwrite` only. Raises OutputError.
    """
    check_output(path, endings=(".safetensors",), foreign=_foreign, overwrite=overwrite)
    numbers: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    concepts: list[_Concept] = []
    for concept in moments:
        for moment in concept.layers.values():
            if id(moment) not in numbers:
                number = numbers[id(moment)] = str(len(numbers))
                floor = torch.tensor([moment.floor], dtype=torch.float64)
                parts = {"own": _packed(moment.own), "free": _packed(moment.free), "floor": _split(floor)}
                tensors |= {f"{number}.{name}": tensor for name, tensor in parts.items()}
        concepts.append(_Concept({name: numbers[id(m)] for name, m in concept.layers.items()}, concept.everywhere))
    entries = _Entries.model_construct(concepts=tuple(concepts)).model_dump(round_trip=True)
    write_file(path, tensors, {"format": FORMAT, "format_version": VERSION, **entries}, "float32")


def load_moments(path: str | os.PathLike[str]) -> list[Moments]:
    """Read them again. Raises FormatError for anything else."""
    with opened(path) as file:
        if (file.metadata.get("format"), file.metadata.get("format_version")) != (FORMAT, VERSION):
            raise FormatError(
                f"'{file.path}' holds no moments of version {VERSION}; record them with record_moments()."
            )
        try:
            entries = _Entries.model_validate({"concepts": file.metadata.get("concepts")})
        except ConfigError as error:
            raise FormatError(f"'{file.path}' is damaged: {error}") from None
        numbers = dict.fromkeys(number for concept in entries.concepts for number in concept.layers.values())
        known = {number: _moment(file, number) for number in numbers}
    return [
        Moments({layer: known[number] for layer, number in concept.layers.items()}, everywhere=concept.everywhere)
        for concept in entries.concepts
    ]


def _foreign(path: Path) -> str:
    """For `check_output`."""
    try:
        with opened(path) as file:
            return "" if file.metadata.get("format") == FORMAT else "it holds no moments"
    except FusionError:
        return "it holds no moments"


def _moment(file: OpenFile, number: str) -> Moment:
    names = [f"{number}.{part}" for part in ("own", "free", "floor")]
    shapes = [file.shapes.get(name, ()) for name in names]
    width = int((8 * shapes[0][-1] + 1) ** 0.5) // 2 if shapes[0] else 0
    packed = (2, width * (width + 1) // 2)
    if shapes != [packed, packed, (2, 1)] or not width:
        raise FormatError(f"'{file.path}' is damaged: moment {number} has the shapes {shapes}.")
    own, free, floor = (file.tensor(name).double().sum(dim=0) for name in names)
    squares = torch.arange(width + 1).cumsum(0)[1:] - 1  # where the diagonal is in a triangle
    if min(own[squares].min(), free[squares].min(), floor.min()) < 0:
        raise FormatError(f"'{file.path}' is damaged: moment {number} has negative means of squares.")
    return Moment(_unpacked(own, width), _unpacked(free, width), float(floor))


def _packed(moment: Tensor) -> Tensor:
    """(I, I) symmetric to (2, P)."""
    return _split(moment[*torch.tril_indices(*moment.shape)])


def _unpacked(triangle: Tensor, width: int) -> Tensor:
    """(P,) to (I, I) symmetric."""
    whole = torch.zeros(width, width, dtype=torch.float64)
    rows, columns = torch.tril_indices(width, width)
    whole[rows, columns] = triangle
    whole[columns, rows] = triangle
    return whole


def _split(values: Tensor) -> Tensor:
    """float64 as two float32 rows whose sum it is, to 48 bits."""
    coarse = values.float()
    return torch.stack([coarse, (values - coarse.double()).float()])
