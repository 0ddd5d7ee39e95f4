"""Regions of a picture as pictures: masks that can be painted over and given back, and all of them in colour."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from fusion.generation.config import INSIDE, Region

COLOURS = ("#7c3aed", "#0d9488", "#d97706", "#db2777", "#2563eb", "#65a30d")  # the studio's
OPACITY = 0.45


def region_mask(region: Region, size: tuple[int, int]) -> Image.Image:
    """A black and white "L" mask of width and height `size` that, given back, holds the same cells."""
    if region.mask is not None:
        inside = region.mask.point([255 * (value >= 255 * INSIDE) for value in range(256)])
        return inside.resize(size, Image.Resampling.NEAREST)
    assert region.box is not None
    width, height = size
    left, top, right, bottom = region.box
    mask = Image.new("L", size, 0)
    corners = round(left * width), round(top * height), round(right * width) - 1, round(bottom * height) - 1
    ImageDraw.Draw(mask).rectangle(corners, fill=255)
    return mask


def with_regions(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """A picture with its regions in colour."""
    for number, region in enumerate(regions):
        opacity = region_mask(region, image.size).point([round(OPACITY * value) for value in range(256)])
        image = Image.composite(Image.new("RGB", image.size, COLOURS[number % len(COLOURS)]), image, opacity)
    return image
