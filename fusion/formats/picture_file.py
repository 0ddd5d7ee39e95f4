"""Pictures and masks as a viewer shows them, from files and from memory: upright, 8 bits, sRGB, on a plain background.

    orientation    EXIF's is applied
    transparency   pictures lie on white, masks on black; alpha channels, palettes and single transparent colours alike
    depth          16 bits become 8; integers above 255 count as 16 bits, floats up to 1 as shares of white
    profile        colours are converted to sRGB by the embedded ICC profile; a broken one is ignored with a warning

Files are PNG, JPEG or WebP; their size is checked in the header, before anything is decoded.
"""

import io
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from fusion.errors import DatasetError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000  # 256 MB decoded; the largest cameras have about 60 megapixels
MIN_SIDE = 32  # in smaller pictures most detail is interpolation
MAX_PROFILE = 4_000_000  # bytes; the largest in use, of printers, have about 2 MB
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # premultiplied modes -> ordinary ones
MIN_MASK = 128  # the brightest value of a mask, below which it hides more than half of every pixel


def load_picture(path: str | Path, name: str | None = None) -> Image.Image:
    """An upright sRGB picture from a PNG, JPEG or WebP file; what is transparent becomes white.

    Raises DatasetError calling the file `name`: damaged, not a picture, too large, too small, animated.
    """
    path = Path(path)
    return as_picture(decode(path, name or path.name), name or path.name)


def load_mask(path: str | Path, size: tuple[int, int] | None = None, name: str | None = None) -> Image.Image:
    """A mask as an "L" picture, white where the concept is; what is transparent becomes black.

    `size`: width, height of its picture, None for any. Raises DatasetError if it differs, as as_mask does for a mask
    that hides everything, and as load_picture does.
    """
    path = Path(path)
    name = name or path.name
    mask = as_mask(decode(path, name), name)
    if size and mask.size != size:
        sizes = f"{mask.width}x{mask.height}, its picture {size[0]}x{size[1]}"
        raise DatasetError(f"{name} is {sizes}; a mask needs the same size.")
    return mask


def as_picture(image: Image.Image, name: str = "The picture") -> Image.Image:
    """Any PIL picture as load_picture gives it; one that is upright sRGB already comes back bit for bit."""
    return _flat(_upright(image, name), "white", name)


def as_mask(image: Image.Image, name: str = "The mask") -> Image.Image:
    """Any PIL picture as an "L" mask; values of 0 and 1 are black and white.

    Raises DatasetError for a mask that would hide everything: black, or darker than half.
    """
    mask = _flat(_upright(image, name), "black", name).convert("L")
    brightest = _extrema(mask)[1]
    if brightest == 0:
        raise DatasetError(f"{name} is all black and would hide the whole picture; paint the concept white.")
    if brightest == 1:
        return mask.point([0, *[255] * 255])
    if brightest < MIN_MASK:
        raise DatasetError(
            f"{name} has no value above {brightest} of 255 and would hide nearly the whole picture; paint the concept "
            "white, 255."
        )
    return mask


def decode(
    source: Path | bytes, name: str, *, formats: tuple[str, ...] = FORMATS, min_side: int | None = None
) -> Image.Image:
    """The upright picture of a file or of its bytes, in its own mode. Raises DatasetError as load_picture does."""
    min_side = MIN_SIDE if min_side is None else min_side
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise DatasetError(f"{name} is no file.")
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats) as image:
            if min(image.size) < min_side:
                size = f"{image.width}x{image.height}"
                raise DatasetError(f"{name} is {size} pixels; both sides need at least {min_side}.")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a second picture behind the first
                raise DatasetError(f"{name} is an animation of {frames} frames; save the one you mean as a picture.")
            return _upright(image, name)
    except DatasetError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise DatasetError(f"{name} is no PNG, JPEG or WebP picture, whatever its name says.") from None
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise _damaged(name, error) from None


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel lets the background through."""
    if image.mode.startswith("I;16"):
        return _transparent_value(image) is not None
    return image.has_transparency_data and _extrema(image.convert("RGBA").getchannel("A"))[0] != 255


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Decoded, and turned as EXIF says. Raises DatasetError for a picture that is too large or damaged."""
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # an opened picture decodes its file only now
        raise _damaged(name, error) from None


def _flat(image: Image.Image, background: str, name: str) -> Image.Image:
    """8 bits of sRGB on a plain background. Raises DatasetError for a damaged picture."""
    profile, alpha = image.info.get("icc_profile"), None
    try:
        if image.mode[0] in "IF":
            if (value := _transparent_value(image)) is not None:
                alpha = Image.fromarray(np.where(np.asarray(image) == value, 0, 255).astype(np.uint8))
            image = _eight_bits(image)
        elif image.has_transparency_data:
            image = image.convert(_STRAIGHT.get(image.mode, image.mode))  # Pillow mixes premultiplied colours with none
            alpha = image.convert("RGBA").getchannel("A")
        if image.mode not in ("L", "RGB", "CMYK"):
            image = image.convert("L" if image.mode in ("LA", "1") else "RGB")
        flat = _to_srgb(image, profile, name) if profile else image.convert("RGB")
        if alpha is not None:
            flat.putalpha(alpha)
            flat = Image.alpha_composite(Image.new("RGBA", flat.size, background), flat).convert("RGB")
    except Exception as error:  # palettes and transparent colours that do not fit the picture
        raise _damaged(name, error) from None
    flat.info = {}  # a second conversion must find nothing to convert
    return flat


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, of any integers, or of floats, as "L"; Pillow would clip instead of scaling."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    largest = values.max(initial=0)
    if image.mode == "F":
        values = values * (255 if largest <= 1 else 1)
    elif image.mode != "I" or largest > 255:
        values = values // 256
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """The colours that an ICC profile gives an L, RGB or CMYK picture, in sRGB."""
    try:
        if len(profile) > MAX_PROFILE:
            raise ValueError(f"it has {len(profile)} bytes")
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = str(source.profile.xcolor_space).strip()
        image = image.convert("RGB") if (image.mode, space) == ("L", "RGB") else image
        transform: Any = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if image.mode == "RGB":  # sRGB by any name: rounding must not change a bit
            colours = _colour_cube()
            if np.abs(np.asarray(transform.apply(colours), int) - np.asarray(colours, int)).max() <= 1:
                return image
        return transform.apply(image)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        _warn_about_profile(name, hash(profile), str(error))
        return image.convert("RGB")


@lru_cache(maxsize=256)
def _warn_about_profile(name: str, _profile: int, reason: str) -> None:
    """Once for each picture: training may read it in every step."""
    logger.warning("%s has a colour profile that cannot be used, and is read as sRGB: %s.", name, reason)


def _colour_cube() -> Image.Image:
    """Every colour of 16 levels, in a line."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))


def _transparent_value(image: Image.Image) -> int | None:
    """The one value of a deep grey picture that is transparent, if it has one."""
    value = image.info.get("transparency")
    return value if isinstance(value, int) and bool((np.asarray(image) == value).any()) else None


def _extrema(image: Image.Image) -> tuple[int, int]:
    """The smallest and largest value of an "L" picture."""
    values: Any = image.getextrema()
    return values


def _too_large(name: str) -> DatasetError:
    return DatasetError(f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels; make it smaller.")


def _damaged(name: str, error: Exception) -> DatasetError:
    if isinstance(error, OSError) and error.strerror:
        return DatasetError(f"{name} cannot be read: {error.strerror}.")
    reason = f"{error or 'broken data'}"
    return DatasetError(f"{name} cannot be read: {reason}. It may be damaged; save or download it again.")
