"""One verb for every file that holds an adapter."""

import os

from fusion.adapters.adapter import Adapter
from fusion.errors import FormatError
from fusion.formats import EXPORTS, native
from fusion.formats.lora_file import read_lora
from fusion.formats.safetensors_file import opened


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter: our own file, or a diffusers or kohya LoRA, which becomes an ungated adapter of type lora.

    Raises FormatError for anything else, and for a LoRA of which a single key is not understood.
    """
    with opened(path) as file:
        if file.metadata.get("format") != native.FORMAT:
            keys = list(file.shapes)
            if any(key.startswith(("lora_unet_", "lora_te")) for key in keys):
                return read_lora(file, EXPORTS["kohya"])
            if any(".lora" in key or ".lokr" in key for key in keys):
                return read_lora(file, EXPORTS["diffusers"])
            raise FormatError(
                f"'{file.path}' holds no adapter, but {len(keys)} tensors such as {', '.join(keys[:3]) or 'none'}. "
                "Whole models are opened as a base, textual inversions by diffusers' load_textual_inversion."
            )
    return native.load(path)
