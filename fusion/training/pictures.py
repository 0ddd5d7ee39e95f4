"""One picture or mask: read safely, converted to RGB, cut to size. Sizes are checked in the header, before decoding.

Shapes: H W sides of the cut, in pixels.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fusion.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64_000_000  # 256 MB decoded; the largest cameras have about 60 megapixels
MIN_SIDE = 32  # in smaller pictures most detail is interpolation


class Cut(NamedTuple):
    """A picture as training uses it, with its original size and crop, which SDXL is conditioned on."""

    pixels: Tensor  # (3, H, W) float32, -1 … 1
    mask: Tensor | None  # (1, H, W) float32, 0 … 1, 1 where the concept is
    original_size: tuple[int, int]  # height, width of the upright file
    crop_top_left: tuple[int, int]  # in the resized picture


def decoded(path: Path, name: str) -> Image.Image:
    """The upright picture in its file's own mode. Raises DatasetError as load_picture does."""
    if path.exists() and not path.is_file():
        raise DatasetError(f"{name} is no file.")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if min(image.size) < MIN_SIDE:
                size = f"{image.width}x{image.height}"
                raise DatasetError(f"{name} is {size} pixels; both sides need at least {MIN_SIDE}.")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a second picture behind the first
                raise DatasetError(f"{name} is an animation of {frames} frames; save the one you mean as a picture.")
            image.load()
            return ImageOps.exif_transpose(image)
    except DatasetError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DatasetError(f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels; make it smaller.") from None
    except UnidentifiedImageError:
        raise DatasetError(f"{name} is no PNG, JPEG or WebP picture, whatever its name says.") from None
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error or 'broken data'}"
        raise DatasetError(f"{name} cannot be read: {reason}. It may be damaged; save or download it again.") from None


def load_picture(path: str | Path, name: str | None = None) -> Image.Image:
    """An upright RGB picture from a PNG, JPEG or WebP file; what is transparent becomes white.

    Raises DatasetError calling the file `name`: damaged, not a picture, too large, too small, animated.
    """
    return flattened(decoded(Path(path), name or Path(path).name), "white")


def load_mask(path: str | Path, size: tuple[int, int] | None = None, name: str | None = None) -> Image.Image:
    """A mask as an "L" picture, white where the concept is; what is transparent becomes black.

    `size`: width, height of its picture, None for any. Raises DatasetError if it differs, for a mask that is all
    black, and as load_picture does.
    """
    name = name or Path(path).name
    mask = flattened(decoded(Path(path), name), "black").convert("L")
    if size and mask.size != size:
        sizes = f"{mask.width}x{mask.height}, its picture {size[0]}x{size[1]}"
        raise DatasetError(f"{name} is {sizes}; a mask needs the same size.")
    if mask.getextrema() == (0, 0):
        raise DatasetError(f"{name} is all black and would hide the whole picture; paint the concept white.")
    return mask


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel lets the background through."""
    if image.mode.startswith("I"):  # 16 bits of grey have no transparency
        return False
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def flattened(image: Image.Image, background: str) -> Image.Image:
    """RGB from any mode, on a plain background."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(max=255).astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def cut(
    picture: Image.Image,
    mask: Image.Image | None,
    resolution: int,
    *,
    center_crop: bool = True,
    random_flip: bool = False,
    generator: torch.Generator | None = None,
) -> Cut:
    """Resize so that the shorter side has `resolution` pixels, and cut a square out of the longer one.

    The square is the middle, or with center_crop = False anywhere; `generator` draws its position and mirroring.
    """
    width, height = picture.size
    scale = resolution / min(width, height)
    wide, high = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    left, top = (wide - resolution) // 2, (high - resolution) // 2
    if not center_crop:
        left = int(torch.randint(wide - resolution + 1, (), generator=generator))
        top = int(torch.randint(high - resolution + 1, (), generator=generator))
    mirrored = random_flip and bool(torch.rand((), generator=generator) < 0.5)
    # Resizing only the square gives the same pixels, and a panorama costs no more than a portrait.
    across, down = width / wide, height / high
    box = (left * across, top * down, (left + resolution) * across, (top + resolution) * down)

    def square(image: Image.Image, method: Image.Resampling) -> Tensor:  # (channels, H, W), 0 … 1
        image = image.resize((resolution, resolution), method, box=box)
        values = np.asarray(ImageOps.mirror(image) if mirrored else image, dtype=np.float32) / 255
        return torch.from_numpy(values).reshape(resolution, resolution, -1).permute(2, 0, 1).contiguous()

    pixels = square(picture, Image.Resampling.LANCZOS) * 2 - 1
    cut_mask = None if mask is None else square(mask, Image.Resampling.BILINEAR)
    return Cut(pixels, cut_mask, (height, width), (top, wide - resolution - left if mirrored else left))
