"""A look at pictures before they are taught: as training will cut them, and what speaks against each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fusion.errors import DatasetError
from fusion.training.pictures import cut, load_picture

FEW = 3  # pictures
ALIKE = 6.0  # mean difference of small copies, of 255, below which two pictures are one
COPY = 16  # pixels


@dataclass(frozen=True)
class Look:
    """One picture as it will be learned; `crop` is None where it cannot be used, and the notes say why."""

    path: Path
    crop: Image.Image | None
    size: tuple[int, int]  # width, height of the upright file
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examination:
    looks: list[Look]
    warnings: list[str]  # of all pictures together


def check_pictures(pictures: Sequence[str | Path], resolution: int) -> Examination:
    """Look at picture files as a training at `resolution` would: nothing is raised, everything is said."""
    looks: list[Look] = []
    copies: dict[str, np.ndarray] = {}
    for path in map(Path, pictures):
        try:
            picture = load_picture(path)
        except DatasetError as error:
            looks.append(Look(path, None, (0, 0), (str(error),)))
            continue
        crop = _crop(picture, resolution)
        notes = _size_notes(picture, resolution)
        copy = np.asarray(crop.resize((COPY, COPY), Image.Resampling.BOX), dtype=np.float32)
        twin = next((name for name, other in copies.items() if np.abs(copy - other).mean() < ALIKE), None)
        if twin:
            notes.append(f"Nearly the same as {twin}: it teaches little more.")
        copies[path.name] = copy
        looks.append(Look(path, crop, picture.size, tuple(notes)))
    usable = sum(look.crop is not None for look in looks)
    few = [f"{usable} picture{'s are' if usable != 1 else ' is'} few; {FEW} or more work better."]
    return Examination(looks, few if 0 < usable < FEW else [])


def _crop(picture: Image.Image, resolution: int) -> Image.Image:
    pixels = cut(picture, None, resolution).pixels  # (3, H, W), -1 … 1
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _size_notes(picture: Image.Image, resolution: int) -> list[str]:
    short, long = sorted(picture.size)
    notes: list[str] = []
    if short < resolution:
        notes.append(f"Small: {picture.width}x{picture.height} is enlarged to {resolution}.")
    if long > 1.5 * short:
        notes.append("Long: much of it is cut off at the ends.")
    return notes
