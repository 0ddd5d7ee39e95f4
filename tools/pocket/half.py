"""Weights on disk in float16 that load in float32.

transformers loads a model in the dtype its config names, diffusers in float32, and processors make float32 pixels: a
folder that is float16 by its own word would fail at its first prompt.
"""

import json
from pathlib import Path

from transformers import PreTrainedModel

PARTS = ("text_config", "vision_config")  # of a CLIPModel


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Save `model`, rounded to float16 in place, under a config that names float32."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(config[name] for name in PARTS if name in config)):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
