"""Adapters in files: our own, other programs' LoRAs, and the library folder. A new LoRA form is one file and one line.

Knows no models: layer names are strings here, and all that a file needs is in it.
"""

from fusion.formats.diffusers_lora import DIFFUSERS
from fusion.formats.kohya_lora import KOHYA
from fusion.formats.lora_file import LoraForm

LORA_FORMS: dict[str, LoraForm] = {
    "diffusers": DIFFUSERS,  # diffusers, PEFT, InvokeAI, ComfyUI
    "kohya": KOHYA,  # A1111, Forge, ComfyUI, InvokeAI, kohya's tools
}
