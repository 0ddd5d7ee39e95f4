"""One picture or mask: read safely, made plain, cut to size. Sizes are checked in the header, before decoding.

Shapes: H W sides of the cut, in pixels.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fusion.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 64_000_000  # 256 MB decoded; the largest cameras have about 60 megapixels
MIN_SIDE = 32  # below, there is nothing to learn but the interpolation


class Cut(NamedTuple):
    """A picture as training sees it, and where it comes from: SDXL is told both."""

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
            _check_header(image, name)
            image.load()
            return ImageOps.exif_transpose(image)
    except DatasetError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise DatasetError(_too_large(name, int(pixels[0]) if pixels else MAX_PIXELS + 1)) from None
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


def load_mask(path: str | Path, size: tuple[int, int], name: str | None = None) -> Image.Image:
    """A mask as an "L" picture, white where the concept is; what is transparent becomes black.

    `size`: width, height of its picture. Raises DatasetError if it differs, and for a mask that is all black.
    """
    name = name or Path(path).name
    mask = flattened(decoded(Path(path), name), "black").convert("L")
    if mask.size != size:
        raise DatasetError(
            f"{name} is {mask.width}x{mask.height}, its picture {size[0]}x{size[1]}; a mask needs the same size."
        )
    if mask.getextrema() == (0, 0):
        raise DatasetError(f"{name} is all black and would hide the whole picture; paint the concept white.")
    return mask


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel lets the background through."""
    if image.mode.startswith("I"):  # 16 bits of grey know no transparency
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
    interpolation: str = "lanczos",
    generator: torch.Generator | None = None,
) -> Cut:
    """Resize so that the shorter side has `resolution` pixels, and cut a square out of the longer one.

    The square is the middle, or with center_crop = False anywhere; `generator` draws place and mirroring.
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
    box = (
        left * width / wide,
        top * height / high,
        (left + resolution) * width / wide,
        (top + resolution) * height / high,
    )

    def square(image: Image.Image, method: str) -> Tensor:  # (H, W, channels), 0 … 1
        image = image.resize((resolution, resolution), Image.Resampling[method.upper()], box=box)
        image = ImageOps.mirror(image) if mirrored else image
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).reshape(resolution, resolution, -1)

    return Cut(
        pixels=square(picture, interpolation).permute(2, 0, 1).contiguous() * 2 - 1,
        mask=None if mask is None else square(mask, "bilinear").permute(2, 0, 1).contiguous(),
        original_size=(height, width),
        crop_top_left=(top, wide - resolution - left if mirrored else left),
    )


def _check_header(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DatasetError(_too_large(name, width * height))
    if min(width, height) < MIN_SIDE:
        raise DatasetError(f"{name} is {width}x{height} pixels; both sides need at least {MIN_SIDE}.")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a second picture behind the first
        raise DatasetError(f"{name} is an animation of {frames} frames; save the one you mean as a picture.")


def _too_large(name: str, pixels: int) -> str:
    return f"{name} has {pixels / 1e6:.0f} megapixels; the limit is {MAX_PIXELS / 1e6:.0f}. Make it smaller."
