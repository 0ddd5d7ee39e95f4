"""One picture and its mask, cut to the size of training.

Shapes: H W sides of the cut, in pixels.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class Cut(NamedTuple):
    """A picture as training uses it, with its original size and crop, which SDXL is conditioned on."""

    pixels: Tensor  # (3, H, W) float32, -1 … 1
    mask: Tensor | None  # (1, H, W) float32, 0 … 1, 1 where the concept is
    original_size: tuple[int, int]  # height, width of the upright file
    crop_top_left: tuple[int, int]  # in the resized picture


def cut(
    picture: Image.Image,
    mask: Image.Image | None,
    size: int | tuple[int, int],
    *,
    center_crop: bool = True,
    random_flip: bool = False,
    generator: torch.Generator | None = None,
) -> Cut:
    """Resize so that the picture just covers `size`, (width, height) or the side of a square, and cut off the rest.

    What stays is the middle, or with center_crop = False any part; `generator` draws its position and mirroring.
    """
    width, height = picture.size
    new_width, new_height = (size, size) if isinstance(size, int) else size
    scale = max(new_width / width, new_height / height)
    wide, high = max(new_width, round(width * scale)), max(new_height, round(height * scale))
    left, top = (wide - new_width) // 2, (high - new_height) // 2
    if not center_crop:
        left = int(torch.randint(wide - new_width + 1, (), generator=generator))
        top = int(torch.randint(high - new_height + 1, (), generator=generator))
    mirrored = random_flip and bool(torch.rand((), generator=generator) < 0.5)
    # Resizing only this part gives the same pixels, and a panorama costs no more than a portrait.
    across, down = width / wide, height / high
    box = (left * across, top * down, (left + new_width) * across, (top + new_height) * down)

    def part(image: Image.Image, method: Image.Resampling) -> Tensor:  # (channels, H, W), 0 … 1
        image = image.resize((new_width, new_height), method, box=box)
        values = np.asarray(ImageOps.mirror(image) if mirrored else image, dtype=np.float32) / 255
        return torch.from_numpy(values).reshape(new_height, new_width, -1).permute(2, 0, 1).contiguous()

    pixels = part(picture, Image.Resampling.LANCZOS) * 2 - 1
    cut_mask = None if mask is None else part(mask, Image.Resampling.BILINEAR)
    return Cut(pixels, cut_mask, (height, width), (top, wide - new_width - left if mirrored else left))
