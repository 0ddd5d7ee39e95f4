"""The picture of an adapter: name.png beside name.safetensors, where the studio and other programs look for it."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps

from fusion.adapters.adapter import Adapter
from fusion.errors import FusionError
from fusion.formats.picture_file import as_picture, decode
from fusion.formats.png_file import MARK_KEY, write_png
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.generation.pipeline_call import OnStep
from fusion.generation.recipe import RECIPE_KEY
from fusion.models.pipeline import Pipeline
from fusion.output_files import MARK

MAX_SIDE = 256  # pixels
MAX_PARTS = 9  # pictures on one


def draw_adapter_picture(
    pipe: Pipeline, adapter: Adapter, prompt: str | None = None, *, seed: int = 0, on_step: OnStep | None = None
) -> Image.Image:
    """What the adapter draws: `prompt`, by default "a <dog>", of several concepts "a <dog> and a <cat>"."""
    names = [concept.token for concept in adapter.info.concepts] or [adapter.info.name]
    config = GenerationConfig(prompt=prompt or " and ".join(f"a {name}" for name in names), seed=seed)
    return generate(pipe, config, [adapter], on_step=on_step)[0].image


def save_adapter_picture(file: str | os.PathLike[str], image: Image.Image) -> Path | None:
    """Write the picture beside an adapter's `file`, at most MAX_SIDE wide and high.

    None where another file of that name is there, also a picture that `generate` drew: it stays as it is.
    Raises OutputError where nothing can be written.
    """
    target = Path(file).with_suffix(".png")
    if os.path.lexists(target) and not _is_adapter_picture(target):
        return None
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return write_png(target, small)


def join_adapter_pictures(parts: Sequence[str | os.PathLike[str]], file: str | os.PathLike[str]) -> Path | None:
    """Write the pictures beside adapters, at most MAX_PARTS, as that of the adapter `file` which is fused of them.

    None where no part has one; else as `save_adapter_picture`.
    """
    images = list[Image.Image]()
    for part in parts:
        with suppress(FusionError):
            image = decode(Path(part).with_suffix(".png"), "The picture", min_side=1)
            images.append(as_picture(image))
    images = images[:MAX_PARTS]
    if not images:
        return None
    joined, rows = Image.new("RGB", (MAX_SIDE, MAX_SIDE)), round(len(images) ** 0.5)
    for row in range(rows):
        top, bottom = (MAX_SIDE * edge // rows for edge in (row, row + 1))
        beside = images[len(images) * row // rows : len(images) * (row + 1) // rows]
        for column, image in enumerate(beside):
            left, right = (MAX_SIDE * edge // len(beside) for edge in (column, column + 1))
            joined.paste(ImageOps.fit(image, (right - left, bottom - top)), (left, top))
    return save_adapter_picture(file, joined)


def _is_adapter_picture(path: Path) -> bool:
    with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
        text = getattr(image, "text", {})
        return text.get(MARK_KEY) == MARK and RECIPE_KEY not in text
    return False
