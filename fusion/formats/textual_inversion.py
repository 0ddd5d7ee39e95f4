"""A concept token as a textual-inversion embedding, for programs that know no adapters' tokens.

SD 1.x, 2.x    one tensor (vectors, dim), named by the token: `pipe.load_textual_inversion(path)` takes the token
               from there; A1111, Forge, ComfyUI and InvokeAI take the only tensor and go by the file's name
SDXL           clip_l and clip_g, one for each text encoder, as A1111 and ComfyUI know them
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fusion.adapters.adapter import AdapterInfo, Concept
from fusion.formats.metadata import modelspec
from fusion.formats.safetensors_file import cast, content_hash, write_file

_SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def embedding_path(lora: Path, concept: Concept) -> Path:
    """`dog.safetensors`, <rex> -> `dog_rex.safetensors`.

    A1111 and ComfyUI use the file's name as the word in prompts, so it must not be a word of the language.
    """
    return lora.with_name(f"{lora.stem}_{concept.token.strip('<>')}.safetensors")


def write_embedding(path: Path, info: AdapterInfo, concept: Concept, rows: Mapping[str, Tensor]) -> None:
    """Write the embeddings (vectors, dim) of one concept per text encoder, in float32."""
    tensors = {_SDXL_KEYS[component] if len(rows) > 1 else concept.token: row for component, row in rows.items()}
    made = cast(tensors, "float32")
    own = AdapterInfo(path.stem, info.base, (concept,))
    write_file(
        path,
        made,
        {
            "format": "pt",
            **modelspec(own, "textual-inversion", implementation="https://github.com/Stability-AI/generative-models"),
            "modelspec.hash_sha256": f"0x{content_hash(made)}",
        },
    )
