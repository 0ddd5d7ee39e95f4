"""Pictures that this package writes: PNGs, whole or not at all, with its mark in their metadata."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from fusion.output_files import MARK, write_output

MARK_KEY = "Software"  # PNG text chunk


def write_png(path: str | os.PathLike[str], image: Image.Image, texts: Mapping[str, str] | None = None) -> Path:
    """Write a picture with further `texts` in its metadata. Raises OutputError. What it replaces was checked before."""
    chunks, data = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, text in {MARK_KEY: MARK, **(texts or {})}.items():
        chunks.add_text(key, text)
    image.save(data, "PNG", pnginfo=chunks)
    return write_output(path, data.getbuffer())
