"""Scenes as pictures, in batches on the device that trains.

A sprite is resized and placed by two matrices, one a direction: F' = W_y F W_xᵀ for each channel, colours multiplied by
alpha. A matrix holds the weights of Lanczos' filter, as Pillow has them, in the rows that the sprite covers, and zeros.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.pocket.scenes import UNITS, Scene

LOBES = 3  # of Lanczos' filter


@lru_cache(maxsize=4096)
def resampling(start: float, length: float, inputs: int, outputs: int) -> Tensor:
    """(outputs, inputs): resizes `length` of `inputs` pixels, from `start` on, to `outputs` ones by Lanczos' filter."""
    scale = length / outputs
    wide = max(scale, 1.0)  # smaller pictures are means of more pixels
    centres = start + (torch.arange(outputs, dtype=torch.float64) + 0.5) * scale
    x = (torch.arange(inputs, dtype=torch.float64) + 0.5 - centres[:, None]) / wide
    weights = (torch.sinc(x) * torch.sinc(x / LOBES)).masked_fill(x.abs() >= LOBES, 0)
    return (weights / weights.sum(1, keepdim=True)).float()


class Painter:
    """Draws scenes `side` pixels wide. Sprites lie where they are painted; on CPUs they are read as they are needed."""

    def __init__(self, sprites: np.ndarray, side: int, device: torch.device | str = "cpu"):
        self.sprites = torch.from_numpy(sprites).to(device)  # (N, S, S, 4)
        self.side, self.device = side, torch.device(device)
        self.rows: dict[int, int] = {}  # size of a resized sprite: its number in `filters`
        self.filters = torch.zeros(0, 1, sprites.shape[1])  # (sizes, largest + 1, S), the last row of each is zero

    def paint(
        self, scenes: Sequence[Scene], windows: Sequence[tuple[int, int]] | None = None, width: int | None = None
    ) -> Tensor:
        """(B, 3, side, side) in [-1, 1]; of each its square of `width` pixels from (left, top) of `windows` on."""
        width = width or self.side
        corners = torch.tensor(windows or [(0, 0)] * len(scenes))  # (B, 2)
        canvas = torch.tensor([scene.background for scene in scenes], dtype=torch.float32, device=self.device)
        canvas = canvas[:, :, None, None].expand(-1, -1, width, width).clone()
        for k in range(max(len(scene.parts) for scene in scenes)):
            of = [b for b, scene in enumerate(scenes) if len(scene.parts) > k]
            figures = self._figures([scenes[b].parts[k] for b in of], corners[of], width)  # (n, 4, width, width)
            at = torch.tensor(of, device=self.device)
            canvas[at] = canvas[at] * (1 - figures[:, 3:]) + figures[:, :3]
        return canvas.round_().clamp_(0, 255).div_(127.5).sub_(1)

    def _figures(self, parts: Sequence, corners: Tensor, width: int) -> Tensor:
        """The parts in the windows: colours multiplied by alpha, (n, 3, width, width), and alpha in [0, 1]."""
        scale = self.side / UNITS
        sizes = [round(part.size * scale) for part in parts]
        lefts = [round(part.x * scale - size / 2) for part, size in zip(parts, sizes, strict=True)]
        tops = [round(part.y * scale - size / 2) for part, size in zip(parts, sizes, strict=True)]
        number = torch.tensor([self._filter(size) for size in sizes])
        sprites = self.sprites[torch.tensor([part.sprite for part in parts], device=self.device)]
        sprites = sprites.permute(0, 3, 1, 2).float()  # (n, 4, S, S)
        alpha = sprites[:, 3:] / 255
        sprites = torch.cat([sprites[:, :3] * alpha, alpha], 1)
        last, size = self.filters.shape[1] - 1, torch.tensor(sizes)[:, None]
        matrices = []
        for starts, axis in ((tops, 1), (lefts, 0)):
            row = torch.arange(width) + corners[:, axis, None] - torch.tensor(starts)[:, None]  # (n, width)
            row = torch.where((row < 0) | (row >= size), last, row)
            matrices.append(self.filters[number[:, None].to(self.device), row.to(self.device)])  # (n, width, S)
        down, across = matrices
        return (down[:, None] @ sprites) @ across[:, None].mT

    def _filter(self, size: int) -> int:
        """The number of the matrix for sprites of this size."""
        if size not in self.rows:
            count, rows, S = self.filters.shape
            filters = torch.zeros(count + 1, max(rows, size + 1), S)
            filters[:count, :rows] = self.filters.cpu()
            filters[count, :size] = resampling(0.0, S, S, size)
            self.filters, self.rows[size] = filters.to(self.device), count
        return self.rows[size]

    def arrays(self, scenes: Sequence[Scene]) -> np.ndarray:
        """(B, side, side, 3) uint8."""
        return as_arrays(torch.cat([self.paint(scenes[k : k + 32]) for k in range(0, len(scenes), 32)]))

    def draw(self, scene: Scene) -> Image.Image:
        return Image.fromarray(self.arrays([scene])[0])


def as_tensor(arrays: Sequence[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """(H, W, 3) uint8 each, to (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def as_arrays(batch: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8."""
    levels = batch.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def sheet_of(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows, two pixels between them."""
    side = pictures[0].width + 2
    sheet = Image.new("RGB", (min(columns, len(pictures)) * side, math.ceil(len(pictures) / columns) * side))
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (k % columns * side, k // columns * side))
    return sheet
