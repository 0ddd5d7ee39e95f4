"""The picture of an adapter: name.png beside name.safetensors, where the studio and other programs look for it."""

import io
import os
from contextlib import suppress
from pathlib import Path

from PIL import Image, PngImagePlugin

from fusion.adapters.adapter import Adapter
from fusion.formats.safetensors_file import write_whole
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.generation.pipeline_call import OnStep
from fusion.models.pipeline import Pipeline

MAX_SIDE = 256  # pixels
MARK = ("Software", "spectral-fusion")  # a text chunk of the PNG: such a picture may be replaced by a newer one


def draw_adapter_picture(
    pipe: Pipeline, adapter: Adapter, prompt: str | None = None, *, seed: int = 0, on_step: OnStep | None = None
) -> Image.Image:
    """What the adapter draws: `prompt`, by default "a <dog>", of several concepts "a <dog> and a <cat>"."""
    names = [concept.token for concept in adapter.info.concepts] or [adapter.info.name]
    config = GenerationConfig(prompt=prompt or " and ".join(f"a {name}" for name in names), seed=seed)
    return generate(pipe, config, [adapter], on_step=on_step)[0].image


def save_adapter_picture(file: str | os.PathLike[str], image: Image.Image) -> Path | None:
    """Write the picture beside an adapter's `file`, at most MAX_SIDE wide and high.

    None where a picture of that name is there that was not written by this function: it stays as it is.
    Raises FormatError where nothing can be written.
    """
    target = Path(file).with_suffix(".png")
    if os.path.lexists(target) and not _is_adapter_picture(target):
        return None
    small, chunks, data = image.convert("RGB"), PngImagePlugin.PngInfo(), io.BytesIO()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    chunks.add_text(*MARK)
    small.save(data, "PNG", pnginfo=chunks)
    write_whole(target, data.getvalue())
    return target


def _is_adapter_picture(path: Path) -> bool:
    with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
        return getattr(image, "text", {}).get(MARK[0]) == MARK[1]
    return False
