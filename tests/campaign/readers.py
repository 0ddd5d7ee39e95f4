"""Everything that reads a file or a text: how an input is made from a valid one, and what is done with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign import picture_inputs as pictures
from campaign import tensor_inputs as tensors
from campaign import text_inputs as texts
from campaign.mutations import Mutations


@dataclass(frozen=True)
class Reader:
    """`write` puts a changed input into a folder; `read` raises FusionError or returns what is wrong with what it
    accepted. `weight`: how many inputs of each hundred."""

    weight: int
    write: Callable[[Mutations, Path, Path], Path]
    read: Callable[[Path, Any], list[str]]
    accepts: bool = True  # a valid file; an embedding alone is always refused


READERS = {
    "adapters": Reader(15, tensors.safetensors_from("adapters"), tensors.use_adapter),
    "loras": Reader(10, tensors.safetensors_from("loras"), tensors.use_adapter),
    "embeddings": Reader(3, tensors.safetensors_from("embeddings"), tensors.use_adapter, accepts=False),
    "moments": Reader(7, tensors.safetensors_from("moments.safetensors"), tensors.use_moments),
    "recipes": Reader(12, texts.write_recipe, texts.use_recipe),
    "settings of trainings": Reader(12, texts.write_settings, texts.use_settings),
    "settings of bases": Reader(7, texts.write_base_settings, texts.use_base_settings),
    "data sets": Reader(8, pictures.write_dataset, pictures.use_dataset),
    "pictures": Reader(8, pictures.write_picture, pictures.use_picture),
    "masks": Reader(5, pictures.write_picture, pictures.use_mask),
    "checkpoints": Reader(6, tensors.write_checkpoint, tensors.use_checkpoint),
    "spectra": Reader(3, tensors.write_spectrum, tensors.use_spectrum),
    "libraries": Reader(2, tensors.write_library, tensors.use_library),
    "prompts and regions": Reader(2, texts.write_text, texts.use_text),
}
