"""The picture of an adapter: name.png beside name.safetensors, where the studio and other programs look for it."""

import io
import os
from contextlib import suppress
from pathlib import Path

from PIL import Image, PngImagePlugin

from fusion.adapters.adapter import Adapter
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.generation.pipeline_call import OnStep
from fusion.generation.recipe import RECIPE_KEY
from fusion.models.pipeline import Pipeline
from fusion.output_files import MARK, write_output

MAX_SIDE = 256  # pixels
MARK_KEY = "Software"  # PNG text chunk


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
    small, chunks, data = image.convert("RGB"), PngImagePlugin.PngInfo(), io.BytesIO()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    chunks.add_text(MARK_KEY, MARK)
    small.save(data, "PNG", pnginfo=chunks)
    return write_output(target, data.getvalue())


def _is_adapter_picture(path: Path) -> bool:
    with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
        text = getattr(image, "text", {})
        return text.get(MARK_KEY) == MARK and RECIPE_KEY not in text
    return False
