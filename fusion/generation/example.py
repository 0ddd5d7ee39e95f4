"""[example] of a base's `fusion.toml`: a picture that shows the base at its best. No torch."""

from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, Field

from fusion.config import MAX_SEED, StrictModel, read_base_defaults
from fusion.generation.config import GenerationConfig
from fusion.models.embedded_models import pocket


class Example(StrictModel):
    """What a base's own table may say; the defaults are for a base without one."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    groups: ClassVar = {"picture": "prompt"}

    prompt: str = Field("a lighthouse by the sea", min_length=1, max_length=300)
    """What to draw, in words that the base draws well."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the picture."""


def base_example(base: str | Path | None = None) -> GenerationConfig:
    """Prompt and seed of a picture that shows `base` at its best: a folder, file or hub id, None for the embedded one.

    They stand in the base's `fusion.toml`, read as strictly as its other tables. Raises ConfigError.
    """
    table = read_base_defaults(base if base is not None else pocket(), "example")
    example = Example.model_validate({}).with_base_defaults(table)
    return GenerationConfig(prompt=example.prompt, seed=example.seed)
