"""LoRA in ComfyUI's own names, those of the first releases, as its LoraSave and some trainers write them. Read only.

diffusion_model.<original path>.lora_down.weight       text_encoders.clip_l.transformer.text_model.<path>.…
"""

from fusion.formats.lora_file import LoraForm, no_scale
from fusion.layer_names import diffusers_path

_ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}


def layer_name(stem: str) -> str | None:
    prefix, _, path = stem.partition(".")
    if prefix == "diffusion_model":
        return f"unet.{diffusers_path(path)}"
    encoder, _, path = path.partition(".transformer.")
    return f"{_ENCODERS[encoder]}.{path.removeprefix('text_model.')}" if encoder in _ENCODERS else None


COMFYUI = LoraForm(
    title="ComfyUI",
    recognises=lambda key: key.startswith(("diffusion_model.", "text_encoders.")),
    layer=layer_name,
    scale=no_scale,
)
