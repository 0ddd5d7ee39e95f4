"""Pictures checked before training: cut as training will cut them, with what is wrong with each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fusion.errors import ConfigError, DatasetError
from fusion.formats.picture_file import load_picture
from fusion.training.buckets import Size, nearest_size
from fusion.training.config import MAX_RESOLUTION
from fusion.training.pictures import cut

MIN_PICTURES = 3
DUPLICATE_THRESHOLD = 6.0  # mean difference of thumbnails, of 255, below which two pictures are nearly the same
THUMBNAIL_SIDE = 16  # pixels


@dataclass(frozen=True)
class PictureCheck:
    """One picture as training will see it; `crop` is None where it cannot be used, and the warnings say why."""

    path: Path
    crop: Image.Image | None
    size: tuple[int, int]  # width, height of the upright picture
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureChecks:
    pictures: list[PictureCheck]
    warnings: list[str]  # about all pictures together


def check_pictures(paths: Sequence[str | Path], resolution: int, sizes: Sequence[Size] | None = None) -> PictureChecks:
    """Check picture files for a training at `resolution`, or in buckets of `sizes`; problems are warnings.

    Raises ConfigError.
    """
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise ConfigError(f"resolution is 1 to {MAX_RESOLUTION} pixels; got {resolution}.")
    checks: list[PictureCheck] = []
    thumbnails: dict[str, np.ndarray] = {}
    for path in map(Path, paths):
        try:
            picture = load_picture(path)
        except DatasetError as error:
            checks.append(PictureCheck(path, None, (0, 0), (str(error),)))
            continue
        size = nearest_size(picture.size, sizes or [(resolution, resolution)])
        crop = _crop(picture, size)
        warnings = _size_warnings(picture, size)
        small = crop.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
        thumbnail = np.asarray(small, dtype=np.float32)
        differences = {name: np.abs(thumbnail - other).mean() for name, other in thumbnails.items()}
        if duplicate := next((name for name, value in differences.items() if value < DUPLICATE_THRESHOLD), None):
            warnings.append(f"Nearly the same as {duplicate}: it adds little.")
        thumbnails[path.name] = thumbnail
        checks.append(PictureCheck(path, crop, picture.size, tuple(warnings)))
    usable = sum(check.crop is not None for check in checks)
    few = [f"{usable} picture{'s are' if usable != 1 else ' is'} few; {MIN_PICTURES} or more work better."]
    return PictureChecks(checks, few if 0 < usable < MIN_PICTURES else [])


def _crop(picture: Image.Image, size: Size) -> Image.Image:
    pixels = cut(picture, None, size).pixels  # (3, H, W), -1 … 1
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _size_warnings(picture: Image.Image, size: Size) -> list[str]:
    scale = max(size[0] / picture.width, size[1] / picture.height)
    warnings: list[str] = []
    if scale > 1:
        side = f"{size[0]}" if size[0] == size[1] else f"{size[0]}x{size[1]}"
        warnings.append(f"Small: {picture.width}x{picture.height} is enlarged to {side}.")
    if size[0] * size[1] * 1.5 < picture.width * picture.height * scale**2:
        warnings.append("Long: much of it is cut off at the ends.")
    return warnings
