"""Stage `classifier`: a plain convolutional one for subject and style, so that no number rests on pocket-clip alone."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.pocket import artwork, subjects
from tools.pocket.autoencoder import SEEN_STYLES, as_tensor
from tools.pocket.scenes import Painter, Palette
from tools.pocket.training import Draws, Plan, train
from tools.pocket.views import view

SEES = 48  # px; enough for what it must tell apart


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (32, 64, 128, 192):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.features = nn.Sequential(*layers)
        self.subject = nn.Linear(before, len(subjects.TRAINED))
        self.style = nn.Linear(before, len(SEEN_STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 128, 128) in [-1, 1] to logits (N, subjects) and (N, styles)."""
        h = self.features(F.interpolate(x, (SEES, SEES), mode="bilinear", antialias=True)).mean((2, 3))
        return self.subject(h), self.style(h)


def run(work: Path, *, steps: int, rate: float, batch: int) -> None:
    sprites, index = artwork.load(work)
    painter = Painter(sprites)
    palette = Palette(index, subjects.TRAINED, SEEN_STYLES, emphasis={})
    torch.manual_seed(0)

    def loss_of(model: nn.Module, draws: Draws, step: int) -> tuple[Tensor, dict[str, float]]:
        x, subject, style = examples(draws.python, painter, palette, batch)
        a, b = model(x)
        right = (a.argmax(1) == subject).float().mean().item()
        loss = F.cross_entropy(a, subject, label_smoothing=0.05) + 0.5 * F.cross_entropy(b, style, label_smoothing=0.05)
        return loss, {"right": right}

    plan = Plan(steps, rate, warmup=50, decay=0.9, average=0.99, checkpoint_every=200)
    best = train(work / "classifier", Classifier(), plan, loss_of)
    torch.save(best.state_dict(), work / "classifier" / "final.pt")


def examples(rng: random.Random, painter: Painter, palette: Palette, count: int) -> tuple[Tensor, Tensor, Tensor]:
    views = [view(rng, painter, palette, palette.sprite(rng, rng.choice(palette.styles))) for _ in range(count)]
    seen = [palette.index[v.sprite] for v in views]
    subject = torch.tensor([subjects.TRAINED.index(sprite.subject) for sprite in seen])
    style = torch.tensor([SEEN_STYLES.index(sprite.style) for sprite in seen])
    return as_tensor([v.picture for v in views]), subject, style


def load(work: Path) -> Classifier:
    model = Classifier()
    model.load_state_dict(torch.load(work / "classifier" / "final.pt", weights_only=True))
    return model.eval()
