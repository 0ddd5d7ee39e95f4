"""Adapters in files: our own, and other programs' LoRAs. A new LoRA form is one file and one line here.

Knows no models: layer names are strings here, and all that a file needs is in it.
"""

from fusion.formats.diffusers_lora import DIFFUSERS
from fusion.formats.kohya_lora import KOHYA
from fusion.formats.lora_file import LoraForm

# A file is read in the first form of which it has a key.
LORA_FORMS: dict[str, LoraForm] = {
    "kohya": KOHYA,  # A1111, Forge, ComfyUI, InvokeAI, kohya's tools
    "diffusers": DIFFUSERS,  # diffusers, PEFT
}
