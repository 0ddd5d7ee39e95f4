"""Stage `judge`: pocket-clip, a stock `CLIPModel` trained from nothing to see what pocket's pictures show.

Two objectives on one image embedding: the contrastive one with captions (which may leave style or colour open, so all
captions that are true of a picture count as its own), and identity: two views of one drawing lie closer than drawings
of the same subject by other hands. Each batch is made for the second: few subjects, each in several styles, twice.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tools.pocket import artwork, subjects
from tools.pocket.autoencoder import SEEN_STYLES, as_tensor
from tools.pocket.scenes import SIDE, Painter, Palette
from tools.pocket.tokenizer import load as load_tokenizer
from tools.pocket.training import Draws, Plan, train
from tools.pocket.views import View, claim, holds, view

SUBJECTS, STYLES = 10, 4  # of one batch, each drawing seen twice
IDENTITY_TEMPERATURE = 0.1


def fresh(tokens: int, eos: int) -> CLIPModel:
    text = {"vocab_size": tokens, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": eos, "pad_token_id": eos}
    image = {"image_size": SIDE, "patch_size": 16, "hidden_size": 192, "intermediate_size": 768}
    image |= {"num_hidden_layers": 4, "num_attention_heads": 6}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=128))


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """(N, 3, 128, 128) in [-1, 1] to unit vectors (N, 128)."""
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)


def embed_texts(model: CLIPModel, ids: Tensor) -> Tensor:
    return F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)


def agree(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy where several answers are right: -log of the mass on all of them. `truth` (N, M) bool."""
    return (logits.logsumexp(1) - logits.masked_fill(~truth, -torch.inf).logsumexp(1))[truth.any(1)].mean()


def batch_of_views(rng: random.Random, painter: Painter, palette: Palette) -> list[View]:
    by_subject: dict[str, list[int]] = {}
    for style in palette.styles:
        for k in palette.by_style[style]:
            by_subject.setdefault(palette.index[k].subject, []).append(k)
    chosen = rng.sample(sorted(by_subject), SUBJECTS)
    drawings = [k for name in chosen for k in rng.sample(by_subject[name], min(STYLES, len(by_subject[name])))]
    return [view(rng, painter, palette, k) for k in drawings for _ in range(2)]


def run(work: Path, *, steps: int, rate: float) -> None:
    sprites, index = artwork.load(work)
    painter, tokenizer = Painter(sprites), load_tokenizer(work)
    palette = Palette(index, [*subjects.TRAINED, *subjects.OTHERS], SEEN_STYLES, emphasis={})
    torch.manual_seed(0)
    model = fresh(len(tokenizer), tokenizer.eos_token_id)

    def loss_of(model: nn.Module, draws: Draws, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = draws.python
        views = batch_of_views(rng, painter, palette)
        claims = [claim(rng, palette, seen) for seen in views]
        ids = tokenizer([c.text for c in claims], padding=True, return_tensors="pt").input_ids
        images = embed_images(model, as_tensor([seen.picture for seen in views]))  # (N, 128)
        texts = embed_texts(model, ids)
        logits = images @ texts.T * model.logit_scale.clamp(max=4.6).exp()
        truth = torch.tensor([[holds(c, seen, palette) for c in claims] for seen in views])
        captions = (agree(logits, truth) + agree(logits.T, truth.T)) / 2
        drawing = torch.tensor([seen.sprite for seen in views])
        itself = torch.eye(len(views), dtype=torch.bool)
        alike = (images @ images.T / IDENTITY_TEMPERATURE).masked_fill(itself, -torch.inf)
        identity = agree(alike, (drawing == drawing[:, None]) & ~itself)
        return captions + identity, {"captions": captions.item(), "identity": identity.item()}

    plan = Plan(steps, rate, warmup=50, decay=0.7, average=0.99, checkpoint_every=100)
    best = train(work / "judge", model, plan, loss_of)
    folder = work / "judge" / "final"
    best.save_pretrained(
        folder
    )  # float32: transformers would load a float16 one in float16, and fail on a processor's pixels
    images = CLIPImageProcessor(
        do_center_crop=False,
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
