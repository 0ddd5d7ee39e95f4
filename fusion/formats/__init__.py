"""Adapters in files: our own, and other programs' LoRAs. A new LoRA form is one file and one line here.

Knows no models: layer names are strings here, and all that a file needs is in it.
"""

from fusion.formats.comfyui_lora import COMFYUI
from fusion.formats.diffusers_lora import DIFFUSERS
from fusion.formats.kohya_lora import KOHYA
from fusion.formats.lora_file import ExportForm, LoraForm

# A file is read in the first form of which it has a key.
LORA_FORMS: dict[str, LoraForm] = {
    "kohya": KOHYA,  # A1111, Forge, ComfyUI, InvokeAI, OneTrainer, LyCORIS, kohya's tools
    "comfyui": COMFYUI,  # ComfyUI's own; read only
    "diffusers": DIFFUSERS,  # diffusers, PEFT
}
EXPORT_FORMS: dict[str, ExportForm] = {name: form.export for name, form in LORA_FORMS.items() if form.export}
