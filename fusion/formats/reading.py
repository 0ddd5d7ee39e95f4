"""One verb for every file that holds an adapter."""

import os

from fusion.adapters.adapter import Adapter
from fusion.errors import FormatError
from fusion.formats import EXPORTS, native
from fusion.formats.lora_file import LoraForm, read_lora
from fusion.formats.safetensors_file import Header, opened


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter: our own file, or a diffusers or kohya LoRA, which becomes an ungated adapter of type lora.

    Raises FormatError for anything else, and for a LoRA of which a single key is not understood.
    """
    with opened(path) as file:
        if not native.is_native(file.header.metadata):
            return read_lora(file, recognised(file.header, str(file.path)))
    return native.load(path)


def recognised(header: Header, name: str) -> LoraForm:
    """Which form of LoRA a file is in, by its keys. Raises FormatError for a file that is none."""
    keys = header.tensors.keys()
    if any(key.startswith(("lora_unet_", "lora_te")) for key in keys):
        return EXPORTS["kohya"]
    if any(".lora" in key or ".lokr" in key for key in keys):
        return EXPORTS["diffusers"]
    raise FormatError(f"'{name}' holds no adapter: it is {_guess(header)}.")


def _guess(header: Header) -> str:
    keys = list(header.tensors)
    if len(keys) == 1 or {"clip_l", "clip_g"} & set(keys):
        return "a textual-inversion embedding, it seems; load that with diffusers' load_textual_inversion"
    if any(key.startswith(("model.diffusion_model.", "down_blocks.", "conv_in.")) for key in keys):
        return "the weights of a whole model; open those as a base"
    return f"a file of {len(keys)} tensors such as {', '.join(keys[:3]) or 'none'}"
