"""Stage `judge`: pocket-clip, a stock `CLIPModel` trained from nothing to see what pocket's pictures show.

Three objectives on one image embedding. Captions, contrastively: among the batch's captions and foils of them (the same
subject in every other style, and on another colour); a caption may leave style or colour open, so all true of a
picture count as its own. Names: every picture against the names of all subjects. Identity: every picture against one
learned proxy per drawing (Movshovitz-Attias et al. 2017), so that two views of a drawing lie closer than drawings of
the same subject by other hands; the proxies are not kept.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tools.pocket import artwork, subjects
from tools.pocket.autoencoder import SEEN_STYLES, Retold, as_tensor
from tools.pocket.autoencoder import load as load_autoencoder
from tools.pocket.captions import article
from tools.pocket.half import save_half
from tools.pocket.scenes import SIDE, Palette
from tools.pocket.tokenizer import load as load_tokenizer
from tools.pocket.training import Draws, Plan, train
from tools.pocket.views import Claim, claim, foils, holds, view

IDENTITY_TEMPERATURE = 0.07


def fresh(tokens: int, eos: int) -> CLIPModel:
    text = {"vocab_size": tokens, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": eos, "pad_token_id": eos}
    text |= {"bos_token_id": None}
    image = {"image_size": SIDE, "patch_size": 16, "hidden_size": 192, "intermediate_size": 768}
    image |= {"num_hidden_layers": 4, "num_attention_heads": 6}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=128))


class Student(nn.Module):
    """The judge, and what only its training needs."""

    def __init__(self, clip: CLIPModel, drawings: int):
        super().__init__()
        self.clip = clip
        self.proxy_embedding = nn.Embedding(drawings, clip.config.projection_dim)


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """(N, 3, 128, 128) in [-1, 1] to unit vectors (N, 128)."""
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)


def embed_texts(model: CLIPModel, ids: Tensor) -> Tensor:
    return F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)


def agree(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy where several answers are right: -log of the mass on all of them. `truth` (N, M) bool."""
    rows = truth.any(1)
    logits, truth = logits[rows], truth[rows]
    return (logits.logsumexp(1) - logits.masked_fill(~truth, -torch.inf).logsumexp(1)).mean()


def run(work: Path, *, steps: int, rate: float, batch: int) -> None:
    sprites, index = artwork.load(work)
    painter, tokenizer = Retold(sprites, load_autoencoder(work)), load_tokenizer(work)
    palette = Palette(index, [*subjects.TRAINED, *subjects.OTHERS], SEEN_STYLES, emphasis={})
    rows = [k for style in palette.styles for k in palette.by_style[style]]
    labels = sorted({index[k].label for k in rows})
    names = tokenized(tokenizer, [article(label) for label in labels])
    torch.manual_seed(0)
    student = Student(fresh(len(tokenizer), tokenizer.eos_token_id), len(rows))

    def loss_of(model: nn.Module, draws: Draws, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = draws.python
        drawings = rng.sample(range(len(rows)), min(batch, len(rows)))
        views = [view(rng, painter, palette, rows[k]) for k in drawings]
        claims = claims_about(rng, palette, views)
        images = embed_images(model.clip, as_tensor([seen.picture for seen in views]))  # (N, 128)
        scale = model.clip.logit_scale.clamp(max=4.6).exp()
        logits = images @ embed_texts(model.clip, tokenized(tokenizer, [c.text for c in claims])).T * scale
        truth = torch.tensor([[holds(c, seen, palette) for c in claims] for seen in views])
        captions = (agree(logits, truth) + agree(logits.T, truth.T)) / 2
        label = torch.tensor([labels.index(index[seen.sprite].label) for seen in views])
        called = images @ embed_texts(model.clip, names).T * scale
        alike = images @ F.normalize(model.proxy_embedding.weight, dim=-1).T / IDENTITY_TEMPERATURE
        naming, identity = F.cross_entropy(called, label), F.cross_entropy(alike, torch.tensor(drawings))
        numbers = {"captions": captions.item(), "naming": naming.item(), "identity": identity.item()}
        return captions + naming + identity, {**numbers, "right": (called.argmax(1) == label).float().mean().item()}

    plan = Plan(steps, rate, warmup=50, decay=0.7, average=0.99, checkpoint_every=100)
    best = train(work / "judge", student, plan, loss_of)
    save(best.clip, tokenizer, work / "judge" / "final")


def claims_about(rng: random.Random, palette: Palette, views: Sequence) -> list[Claim]:
    """For each view a true claim, and those that differ from it by one word and are false."""
    true = [claim(rng, palette, seen) for seen in views]
    return [*true, *(false for seen in views for false in foils(rng, palette, seen))]


def tokenized(tokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


def save(model: CLIPModel, tokenizer, folder: Path) -> None:
    save_half(model, folder)
    # As CLIP's own: the middle square of a picture that is not square.
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
