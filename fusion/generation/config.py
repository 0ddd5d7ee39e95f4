"""What to draw and how, without torch: the settings of `generate`, and regions of a picture."""

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion.errors import ConfigError

if TYPE_CHECKING:  # help must be immediate
    from PIL import Image
    from torch import Tensor

INSIDE = 0.5  # share of a cell that a painted mask must cover


@dataclass(frozen=True)
class Region:
    """A part of the picture and what it shows: a box in shares of width and height, or a mask, white inside."""

    prompt: str
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom in 0 … 1
    mask: "Image.Image | None" = None

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise ConfigError(f"Region '{self.prompt}' needs a box or a mask, one of them.")
        if self.box and not (0 <= self.box[0] < self.box[2] <= 1 and 0 <= self.box[1] < self.box[3] <= 1):
            raise ConfigError(
                f"Region '{self.prompt}' has the box {' '.join(f'{x:g}' for x in self.box)}; it should be left, top, "
                "right, bottom in shares of the picture, 0 to 1, like 0 0 0.5 1."
            )

    def cover(self, height: int, width: int) -> "Tensor":
        """The cells it holds, (height, width) bool: those whose centre is in the box, or that the mask half covers."""
        import numpy as np
        import torch
        from PIL import Image

        if self.mask is not None:
            shares = self.mask.convert("L").resize((width, height), Image.Resampling.BOX)
            return torch.from_numpy(np.array(shares, dtype=np.float32) / 255 >= INSIDE)
        assert self.box is not None
        left, top, right, bottom = self.box
        across, down = ((torch.arange(n) + 0.5) / n for n in (width, height))
        return ((top <= down) & (down < bottom))[:, None] & ((left <= across) & (across < right))

    def to_json(self) -> dict[str, Any]:
        """For recipes; a mask as a black and white PNG in base64."""
        if self.mask is None:
            return {"prompt": self.prompt, "box": list(self.box or ())}
        file = io.BytesIO()
        inside = self.mask.convert("L").point(lambda value: 255 * (value >= 255 * INSIDE))
        inside.convert("1").save(file, "PNG")
        return {"prompt": self.prompt, "mask": base64.b64encode(file.getvalue()).decode()}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Region":
        """Raises KeyError, TypeError or ValueError for what to_json did not write."""
        from PIL import Image

        if "mask" not in entry:
            left, top, right, bottom = map(float, entry["box"])
            return cls(str(entry["prompt"]), (left, top, right, bottom))
        with Image.open(io.BytesIO(base64.b64decode(entry["mask"], validate=True)), formats=("PNG",)) as image:
            return cls(str(entry["prompt"]), mask=image.convert("L"))
