"""A CLIP model as judge: pictures and texts become unit vectors, and likeness is their cosine.

The same code for the embedded `pocket-clip` and any CLIP of transformers. A judge is only believed as far as it can
tell the references apart: `reliability` says how far that is.

Shapes: N pictures or texts, D embedding width, C concepts.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fusion.errors import BaseMismatch
from fusion.models.pipelines import best_device, embedded

BATCH = 32


@dataclass(frozen=True)
class Judge:
    """A CLIPModel with its processor."""

    name: str
    model: Any
    processor: Any

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D) in float32."""
        parts: list[Tensor] = []
        for start in range(0, len(images), BATCH):
            batch = [image.convert("RGB") for image in images[start : start + BATCH]]
            pixels = self.processor.image_processor(batch, return_tensors="pt").pixel_values.to(self.model.device)
            parts.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) in float32; what is beyond the model's text length is cut off."""
        words = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        words = words.to(self.model.device)
        encoded = self.model.text_model(input_ids=words.input_ids, attention_mask=words.attention_mask)
        return F.normalize(self.model.text_projection(encoded.pooler_output).float(), dim=-1).cpu()


def open_judge(where: str | Path | None = None, *, device: str | torch.device | None = None) -> Judge:
    """A judge from a folder or hub id, `pocket-clip` by default. Safetensors only, no code from its repository.

    Raises BaseMismatch when it cannot be opened.
    """
    from transformers import CLIPModel, CLIPProcessor

    source = str(where) if where is not None else str(embedded("pocket-clip", "config.json"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = CLIPModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
            processor = CLIPProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseMismatch(f"'{source}' could not be opened as a CLIP model to judge by: {error}") from error
    return Judge(Path(source).name, model.to(torch.device(device or best_device())).float().eval(), processor)


def likeness(crops: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Mean cosine of each crop (N, D) to the references (n, D) of each of C concepts, (N, C)."""
    return torch.stack([(crops @ own.T).mean(dim=1) for own in references], dim=1)


def reliability(references: Sequence[Tensor]) -> float:
    """The share of reference pictures that are most like their own concept's others, 0 … 1; 1 for one concept."""
    right = [
        int(likeness(row[None], [_without(own, i) if other is own else other for other in references]).argmax()) == c
        for c, own in enumerate(references)
        for i, row in enumerate(own)
    ]
    return sum(right) / len(right)


def _without(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]]) if len(rows) > 1 else rows
