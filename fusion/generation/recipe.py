"""Pictures with their recipes: everything that made a picture, in a text chunk of its PNG."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image
from pydantic import Field, model_validator

from fusion.config import StrictModel
from fusion.errors import ConfigError, FormatError
from fusion.formats.png_file import write_png
from fusion.generation.config import GenerationConfig
from fusion.output_files import check_output

RECIPE_KEY = "fusion"  # PNG text chunk
MAX_DECODED = 2**24  # pixels of a picture that is decoded for its recipe


class UsedAdapter(StrictModel):
    """An adapter as a recipe names it; `digest` is of its contents, `file` only a hint where it was."""

    name: str
    digest: str
    strength: float
    tokens: tuple[str, ...]
    file: str | None = None
    word: str | None = None  # what `bind` has bound it to


class Recipe(StrictModel):
    """Everything that made one picture: the same code with the same recipe makes it again, exact on one machine."""

    config: GenerationConfig  # of the whole batch, with what the base and the pipeline have added
    base: str
    adapters: tuple[UsedAdapter, ...] = ()
    index: int = Field(default=0, ge=0)  # of this picture in its batch
    image: str | None = None  # SHA-256 of the picture that img2img started from
    mask: str | None = None  # SHA-256 of the mask of inpainting

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.index >= (count := len(self.config.seeds())):
            raise ConfigError(f"index {self.index} is beyond the {count} pictures of the batch.")
        return self

    @property
    def picture_seed(self) -> int:
        """The seed of this picture alone."""
        return self.config.seeds()[self.index]

    @property
    def picture_prompt(self) -> str:
        """The prompt of this picture alone."""
        return self.config.picture_prompts()[self.index]

    def to_json(self) -> dict[str, Any]:
        """One flat table: the settings of the drawing, and beside them the recipe's own entries."""
        return self.config.model_dump(mode="json") | self.model_dump(mode="json", exclude={"config"})

    @classmethod
    def from_json(cls, table: object) -> Self:
        """Raises ConfigError for what no version of to_json has written."""
        if not isinstance(table, Mapping):
            raise ConfigError("it is no table of settings.")
        values = {name: value for name, value in table.items() if value is not None}
        entries = {name: values.pop(name) for name in ("base", "adapters", "index", "image", "mask") if name in values}
        return cls.model_validate({**entries, "config": GenerationConfig.model_validate(values)})

    def parameters(self) -> str:
        """The one-text form other Stable Diffusion tools show."""
        config = self.config
        negative = f"\nNegative prompt: {config.negative_prompt}" if config.negative_prompt else ""
        return (
            f"{self.picture_prompt}{negative}\nSteps: {config.num_inference_steps}, "
            f"Sampler: {config.scheduler or 'default'}, CFG scale: {config.guidance_scale}, "
            f"Seed: {self.picture_seed}, Size: {config.width}x{config.height}, Model: {self.base}"
        )


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    recipe: Recipe

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a PNG that carries its recipe; one that carries a recipe is replaced, others with `overwrite` only.

        Raises OutputError.
        """
        path = check_output(path, overwrite=overwrite)
        texts = {RECIPE_KEY: json.dumps(self.recipe.to_json()), "parameters": self.recipe.parameters()}
        return write_png(path, self.image, texts)


def recipe_of(path: str | Path) -> Recipe:
    """The recipe in a PNG. Raises FormatError when there is none, or it is not ours."""
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises for names that are too long)
        raise FormatError(f"There is no file '{path}'.")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(RECIPE_KEY)
            if text is None and image.width * image.height <= MAX_DECODED:  # it may stand behind the pixels
                text = getattr(image, "text", {}).get(RECIPE_KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FormatError(f"'{path}' cannot be read as a picture: {error}.") from error
    if text is None:
        raise FormatError(f"'{path}' carries no recipe; only PNGs drawn by `fusion generate` do.")
    try:
        return Recipe.from_json(json.loads(text))
    except (ValueError, RecursionError, ConfigError) as error:
        raise FormatError(f"The recipe in '{path}' is damaged: {error}") from error
