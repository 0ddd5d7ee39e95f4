"""A MASK of ComfyUI as the cells of a picture on which a bound LoRA acts, in layers that see no tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.errors import GatingError
from fusion.models.gates import PictureRows


class MaskCells:
    """The cells that a mask at least half covers, at every level of the UNet."""

    def __init__(self, mask: Tensor) -> None:
        """`mask`: (H, W) or (1, H, W), 0 … 1. Raises GatingError for several masks."""
        if (mask.ndim == 3 and len(mask) != 1) or mask.ndim not in (2, 3):
            raise GatingError(f"A LoRA is bound with one MASK; this one has shape {tuple(mask.shape)}.")
        self._mask = mask.detach().float().reshape(1, 1, *mask.shape[-2:])
        self._size = 0, 0  # of the latent being drawn
        self._levels: dict[tuple[int, torch.device], Tensor] = {}

    def start(self, height: int, width: int) -> None:
        """A latent of this size is drawn. Raises GatingError for one of other proportions, as a crop has."""
        rows, columns = self._mask.shape[-2:]
        if abs(rows * width - columns * height) > max(rows, columns):
            raise GatingError(
                f"The MASK of a bound LoRA is {columns}x{rows}, and a latent of {width}x{height} is no such picture, "
                "but perhaps a crop of it; draw crops, tiles and areas without the MASK."
            )
        if (height, width) != self._size:
            self._size, self._levels = (height, width), {}

    def rows(self, whole: PictureRows) -> PictureRows:
        """The rows of whole pictures, less those outside of the mask."""
        return PictureRows(whole.prompts, whole.size, whole.chunks, self)

    def prompt_cells(self, cells: int, device: torch.device) -> Sequence[Tensor]:
        """The cells (n,), ascending, of the one prompt. GatingError for no level of the picture."""
        if (cells, device) not in self._levels:
            height, width = self._size
            while height * width > cells:
                height, width = -(-height // 2), -(-width // 2)
            if height * width != cells:
                raise GatingError(f"A layer of the UNet has {cells} cells, no level of {self._size[::-1]}.")
            shares = F.interpolate(self._mask, (height, width), mode="area").flatten()
            self._levels[cells, device] = (shares >= 0.5).nonzero()[:, 0].to(device)
        return [self._levels[cells, device]]
