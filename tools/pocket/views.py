"""Pictures of one thing for those who judge: alone, or cut out of a scene of several, sharp or spoiled.

A view is what evaluation shows a judge: the part of a picture where a prompt has put something, at 128 × 128 px.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tools.pocket import subjects
from tools.pocket.captions import article
from tools.pocket.scenes import ARRANGEMENTS, SIDE, Painter, Palette, compose

MARGIN = 1.16  # of the box around a part, in sizes of the part
KINDS = {"alone": 5, "placed": 1, "beside": 2, "stacked": 1, "row": 1, "four": 2}


@dataclass(frozen=True)
class View:
    picture: np.ndarray  # (128, 128, 3) uint8
    sprite: int
    colour: str


@dataclass(frozen=True)
class Claim:
    """A caption and what it says; None for what it leaves open."""

    subject: str
    label: str
    style: str | None
    colour: str | None

    @property
    def text(self) -> str:
        words = article(f"{self.style} style {self.label}" if self.style else self.label)
        return f"{words} on a {self.colour} background" if self.colour else words


def view(rng: random.Random, painter: Painter, palette: Palette, sprite: int, *, spoil: bool = True) -> View:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    count = {"alone": 1, "placed": 1, "beside": 2, "stacked": 2, "row": 3, "four": 4}[kind]
    mine = rng.randrange(count)
    sprites = [palette.sprite(rng) for _ in range(count)]
    sprites[mine] = sprite
    scene = compose(rng, palette, kind, sprites=sprites, jitter=1.0)
    part = scene.parts[mine]
    picture = cut(painter.draw(scene), kind, part.place)
    return View(spoiled(rng, picture) if spoil else np.asarray(picture), sprite, scene.colour)


def cut(picture: Image.Image, arrangement: str, place: str) -> Image.Image:
    """The square around a place, enlarged to 128 px; the whole picture where one thing fills it."""
    if arrangement == "alone":
        return picture
    places, size = ARRANGEMENTS[arrangement]
    x, y = places[place]
    half = size * MARGIN / 2
    box = (x - half, y - half, x + half, y + half)
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=tuple(min(SIDE, max(0, edge)) for edge in box))


def spoiled(rng: random.Random, picture: Image.Image) -> np.ndarray:
    """Blurred or noisy in half of the cases: what is drawn is never as clean as the artwork."""
    if rng.random() < 0.5:
        side = rng.choice((40, 56, 72, 96))
        picture = picture.resize((side, side), Image.Resampling.BILINEAR).resize(
            (SIDE, SIDE), Image.Resampling.BILINEAR
        )
    pixels = np.asarray(picture)
    if rng.random() < 0.4:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 14), pixels.shape)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels


def claim(rng: random.Random, palette: Palette, seen: View) -> Claim:
    sprite = palette.index[seen.sprite]
    style = sprite.style if rng.random() < 0.5 else None
    return Claim(sprite.subject, sprite.label, style, seen.colour if rng.random() < 0.35 else None)


def foils(rng: random.Random, palette: Palette, seen: View) -> list[Claim]:
    """What is false of a view by one word alone: on another colour, and by each of the other hands."""
    sprite = palette.index[seen.sprite]
    colour = rng.choice([name for name in subjects.COLOURS if name != seen.colour])
    style = sprite.style if rng.random() < 0.5 else None
    others = [name for name in palette.styles if name != sprite.style]
    said = seen.colour if rng.random() < 0.35 else None
    return [
        Claim(sprite.subject, sprite.label, style, colour),
        *(Claim(sprite.subject, sprite.label, other, said) for other in others),
    ]


def holds(claim: Claim, seen: View, palette: Palette) -> bool:
    sprite = palette.index[seen.sprite]
    return (
        claim.subject == sprite.subject and claim.style in (None, sprite.style) and claim.colour in (None, seen.colour)
    )
