"""A CLIP model as judge: pictures and texts become unit vectors, and their similarity is the cosine (CLIP-I, CLIP-T).

The same code serves the embedded `pocket-clip` and any CLIP model of transformers. A judge's numbers mean something as
far as it can tell the references apart, which `reliability` measures.

Shapes: N pictures or texts, D embedding width, C concepts, n references of one concept.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fusion.errors import BaseMismatch
from fusion.formats.picture_file import as_picture
from fusion.models.devices import as_device
from fusion.models.embedded_models import embedded
from fusion.models.pipelines import silent_loading

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

BATCH = 32


@dataclass(frozen=True)
class Judge:
    """A CLIP model with its processor."""

    name: str
    model: CLIPModel
    processor: CLIPProcessor

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D) in float32."""
        model, processor, vectors = self.model, self.processor.image_processor, list[Tensor]()
        for start in range(0, len(images), BATCH):
            batch = [as_picture(image) for image in images[start : start + BATCH]]
            pixels = processor(batch, return_tensors="pt").pixel_values.to(model.device)
            vectors.append(model.visual_projection(model.vision_model(pixels).pooler_output))
        return F.normalize(torch.cat(vectors).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) in float32; text beyond the model's length is cut off."""
        tokens = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        encoded = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(self.model.text_projection(encoded.pooler_output).float(), dim=-1).cpu()


def open_judge(where: str | Path | None = None, *, device: str | torch.device | None = None) -> Judge:
    """Open a CLIP model from a folder or hub id, `pocket-clip` by default. Safetensors only, no code from the hub.

    Raises BaseMismatch when it cannot be opened, ConfigError for a device that is not here.
    """
    device = as_device(device)
    source = str(where) if where is not None else str(embedded("pocket-clip", "config.json"))
    try:
        with silent_loading(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import CLIPModel, CLIPProcessor

            model: Any = CLIPModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
            processor = CLIPProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseMismatch(f"'{source}' could not be opened as a CLIP model to judge by: {error}") from error
    return Judge(Path(source).name, model.to(device).float().eval(), processor)


def similarity(crops: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Mean cosine of each crop (N, D) to the references (n, D) of each of C concepts, (N, C)."""
    return torch.stack([(crops @ concept.T).mean(dim=1) for concept in references], dim=1)


def reliability(references: Sequence[Tensor]) -> float:
    """The share of references that are most similar to the others of their own concept, 0 … 1; 1 for one concept."""
    correct = [
        int(similarity(row[None], [_without(r, i) if r is rows else r for r in references]).argmax()) == concept
        for concept, rows in enumerate(references)
        for i, row in enumerate(rows)
    ]
    return sum(correct) / len(correct)


def _without(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]]) if len(rows) > 1 else rows
