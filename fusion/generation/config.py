"""The settings of a drawing, and regions of a picture. Nothing here imports torch or Pillow before it needs them."""

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer, model_validator

from fusion.config import MAX_PROMPT, MAX_SEED, SURROGATE, StrictModel
from fusion.errors import ConfigError, DatasetError
from fusion.prompt_syntax import PromptWeighting

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

INSIDE = 0.5  # share of a cell that a painted mask must cover
MAX_REGIONS = 64
MAX_PICTURES = 256  # of a drawing
MAX_PIXELS = 2**28  # of all pictures of a drawing, which are decoded together: 256 of 1024x1024


@dataclass(frozen=True)
class Region:
    """A part of the picture and what it shows: a box in shares of width and height, or a mask, white inside."""

    prompt: str
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom in 0 … 1
    mask: "Image.Image | None" = None

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise ConfigError(f"Region '{self.prompt}' needs a box or a mask, one of them.")
        if self.mask is not None:
            from fusion.formats.picture_file import as_mask

            try:
                object.__setattr__(self, "mask", as_mask(self.mask, f"The mask of region '{self.prompt}'"))
            except DatasetError as error:
                raise ConfigError(str(error)) from None
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
            shares = self.mask.resize((width, height), Image.Resampling.BOX)
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
        inside = self.mask.point([255 * (value >= 255 * INSIDE) for value in range(256)])
        inside.convert("1").save(file, "PNG")
        return {"prompt": self.prompt, "mask": base64.b64encode(file.getvalue()).decode()}

    @classmethod
    def from_json(cls, entry: object) -> "Region":
        """Raises ConfigError for what to_json did not write."""
        if isinstance(entry, dict) and SURROGATE.search(str(entry.get("prompt"))):
            raise ConfigError("The prompt of a region has half of a surrogate pair, which is no valid text.")
        match entry:
            case {"prompt": str(prompt)} if len(prompt) > MAX_PROMPT:
                raise ConfigError(f"The prompt of a region has {len(prompt)} letters; the limit is {MAX_PROMPT}.")
            case {"prompt": str(prompt), "box": [left, top, right, bottom], **rest} if not rest:
                shares = [left, top, right, bottom]
                if all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
                    return cls(prompt, (float(left), float(top), float(right), float(bottom)))
            case {"prompt": str(prompt), "mask": str(mask), **rest} if not rest:
                return cls(prompt, mask=_mask_from(mask))
            case _:
                pass
        raise ConfigError("A region is a prompt with a box of four shares, 0 to 1, or with a mask; this one is not.")


def _mask_from(text: str) -> "Image.Image":
    from fusion.formats.picture_file import decode

    try:
        return decode(base64.b64decode(text, validate=True), "The mask of a region", formats=("PNG",), min_side=1)
    except ValueError:
        raise ConfigError("The mask of a region is no base64.") from None
    except DatasetError as error:
        raise ConfigError(str(error)) from None


def _as_region(value: object) -> object:
    return value if isinstance(value, Region) else Region.from_json(value)


RegionField = Annotated[InstanceOf[Region], BeforeValidator(_as_region), PlainSerializer(Region.to_json)]


class GenerationConfig(StrictModel):
    """What to draw and how: the flags of `fusion generate`, [generation] of a base's `fusion.toml`, recipes.

    What the user has not set may come from the base: `with_base_defaults`.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    aliases: ClassVar = {
        "steps": "num_inference_steps",
        "batch": "num_images",
        "num_images_per_prompt": "num_images",
        "sampler": "scheduler",
    }
    users_own = ("prompt", "prompt_weighting")
    groups: ClassVar = {"picture": "prompt", "drawing": "seed"}

    # The kind named last is the one that messages speak of.
    prompt: tuple[str, ...] | Annotated[str, Field(max_length=MAX_PROMPT)]
    """What to draw, with the adapters' tokens: "a <dog> on a beach". Several are drawn in one batch."""
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT)
    """What the picture should not show."""
    regions: Literal["auto"] | Annotated[tuple[RegionField, ...], Field(max_length=MAX_REGIONS)] = ()
    """Parts of the picture with prompts of their own; with auto, each concept has one where the base would draw it."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the first picture; the next ones count up."""
    num_images: int = Field(default=1, ge=1, le=MAX_PICTURES)
    """How many pictures of each prompt to draw, all at a time."""
    num_inference_steps: int = Field(default=30, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=0, le=1000)
    """How closely to follow the prompt."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """How much of the contrast that guidance adds is taken back, 0 to 1."""
    prompt_weighting: PromptWeighting = "none"
    """How weights of words are written: as (word:1.2) in a1111, as word+ in compel, or not at all: all is text."""
    scheduler: str | None = None
    """ddim, euler, euler_a, dpmpp_2m, unipc, euler_trailing, lcm, tcd, ... Default: the base's own."""
    width: int | None = Field(default=None, ge=8, le=8192)
    """Width in pixels. Default: of the picture to start from, or the base's own."""
    height: int | None = Field(default=None, ge=8, le=8192)
    """Height in pixels. Default: as for the width."""
    image_strength: float = Field(default=0.6, ge=0.01, le=1)
    """How far the drawing may depart from the picture it starts from, up to 1."""
    clip_skip: int = Field(default=0, ge=0, le=32)
    """Layers left out at the end of the text encoder; 1 is "Clip skip: 2" of A1111 and kohya."""
    gating: Literal["tokens", "none"] | None = None
    """How the adapters are gated. Default: as their files say."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        count = len(self.prompts) * self.num_images
        if not 1 <= count <= MAX_PICTURES or max(map(len, self.prompts)) > MAX_PROMPT:
            raise ConfigError(
                f"{len(self.prompts)} prompts and {count} pictures: the limit is {MAX_PICTURES}, of up to "
                f"{MAX_PROMPT} letters each."
            )
        if len(self.prompts) > 1 and self.regions not in ("auto", ()):
            raise ConfigError(f"Regions are those of one prompt, and there are {len(self.prompts)}; draw them apart.")
        if count * (self.width or 8) * (self.height or 8) > MAX_PIXELS:
            raise ConfigError(
                f"{count} pictures of {self.width}x{self.height} are too many at a time; the limit is "
                f"{MAX_PIXELS // 1_000_000} megapixels in all."
            )
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, one or several."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    def picture_prompts(self) -> list[str]:
        """The prompt of each picture: all pictures of the first prompt, then those of the next."""
        return [prompt for prompt in self.prompts for _ in range(self.num_images)]

    def seeds(self) -> list[int]:
        """A seed for each picture."""
        return [(self.seed + i) % (MAX_SEED + 1) for i in range(len(self.prompts) * self.num_images)]
