"""The picture of an adapter: name.png beside name.safetensors, where the studio and other programs look for it."""

import os
from contextlib import suppress
from pathlib import Path

from PIL import Image

from fusion.adapters.adapter import Adapter
from fusion.formats.png_file import MARK_KEY, write_png
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.generation.pipeline_call import OnStep
from fusion.generation.recipe import RECIPE_KEY
from fusion.models.pipeline import Pipeline
from fusion.output_files import MARK

MAX_SIDE = 256  # pixels


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


def _is_adapter_picture(path: Path) -> bool:
    with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
        text = getattr(image, "text", {})
        return text.get(MARK_KEY) == MARK and RECIPE_KEY not in text
    return False
