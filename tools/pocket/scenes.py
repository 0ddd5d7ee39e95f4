"""One to four sprites in named places on a plain background, 128 × 128 px.

Captions must nearly determine the picture, or the denoiser is still at blobs after four times the samples: hence
little jitter, no mirroring, and named places. Everything is drawn from the `random.Random` that is given.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tools.pocket import subjects
from tools.pocket.artwork import Sprite

SIDE = 128
CORNERS = {"top left": (34, 34), "top right": (94, 34), "bottom left": (34, 94), "bottom right": (94, 94)}
SIDES = {"left": (34, 64), "right": (94, 64), "top": (64, 34), "bottom": (64, 94)}
THIRDS = {"left": (22, 64), "middle": (64, 64), "right": (106, 64)}

# name: (places of its parts, their size in px). "three" leaves out one of the four corners.
ARRANGEMENTS: dict[str, tuple[dict[str, tuple[int, int]], int]] = {
    "alone": ({"middle": (64, 64)}, 100),
    "placed": ({**SIDES, **CORNERS}, 56),
    "beside": ({place: SIDES[place] for place in ("left", "right")}, 56),
    "stacked": ({place: SIDES[place] for place in ("top", "bottom")}, 56),
    "twins": ({place: SIDES[place] for place in ("left", "right")}, 56),
    "row": (THIRDS, 40),
    "three": (CORNERS, 52),
    "four": (CORNERS, 52),
}


@dataclass(frozen=True)
class Part:
    sprite: int  # row of the index
    place: str
    x: float
    y: float
    size: int


@dataclass(frozen=True)
class Scene:
    arrangement: str
    colour: str
    background: tuple[int, int, int]
    parts: tuple[Part, ...]


class Palette:
    """Which sprites a stage may use, and how often it picks each."""

    def __init__(
        self, index: Sequence[Sprite], names: Sequence[str], styles: Sequence[str], *, emphasis: dict[str, float]
    ):
        wanted = set(names)
        self.index = index
        self.by_style = {
            style: [k for k, sprite in enumerate(index) if sprite.style == style and sprite.subject in wanted]
            for style in styles
        }
        self.weights = {
            style: [emphasis.get(index[k].subject, 1.0) for k in rows] for style, rows in self.by_style.items()
        }
        # Styles by what they hold; the plain one three times, for most captions will name no style.
        self.styles = [style for style in styles if self.by_style[style]]
        self.style_weights = [
            3.0 if style == subjects.PLAIN_STYLE else len(self.by_style[style]) / len(wanted) for style in self.styles
        ]

    def style(self, rng: random.Random) -> str:
        return rng.choices(self.styles, self.style_weights)[0]

    def sprite(self, rng: random.Random, style: str | None = None) -> int:
        style = style or self.style(rng)
        return rng.choices(self.by_style[style], self.weights[style])[0]


def compose(
    rng: random.Random,
    palette: Palette,
    arrangement: str,
    *,
    colour: str | None = None,
    sprites: Sequence[int] | None = None,
    jitter: float = 0.35,
) -> Scene:
    """A scene of that arrangement; `sprites` and `colour` are drawn where they are not given."""
    places, size = ARRANGEMENTS[arrangement]
    names = list(places)
    if arrangement == "three":
        names.remove(rng.choice(names))
    if arrangement == "placed":
        names = [rng.choice(names)]
    if sprites is None:
        # Half of the time one style throughout, as people ask; else each part its own.
        style = palette.style(rng) if rng.random() < 0.5 else None
        sprites = [palette.sprite(rng, style) for _ in names]
    if arrangement == "twins":
        sprites = [sprites[0]] * 2
    near = lambda reach: rng.uniform(-reach, reach) * jitter  # noqa: E731
    parts = tuple(
        Part(k, name, places[name][0] + near(4), places[name][1] + near(6), round(size * (1 + near(0.08))))
        for k, name in zip(sprites, names, strict=True)
    )
    colour = colour or rng.choice(list(subjects.COLOURS))
    return Scene(arrangement, colour, shade(rng, colour, jitter), parts)


def shade(rng: random.Random, colour: str, jitter: float) -> tuple[int, int, int]:
    light = rng.uniform(-10, 10)
    r, g, b = (
        min(255, max(0, round(value + (light + rng.uniform(-6, 6)) * jitter))) for value in subjects.COLOURS[colour]
    )
    return r, g, b


class Painter:
    """Draws scenes; keeps the sprites it has resized."""

    def __init__(self, sprites: np.ndarray):
        self.sprites = sprites  # (N, 128, 128, 4)
        self.resized: dict[tuple[int, int], Image.Image] = {}

    def sprite(self, k: int, size: int) -> Image.Image:
        if (k, size) not in self.resized:
            image = Image.fromarray(np.asarray(self.sprites[k]))
            self.resized[k, size] = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return self.resized[k, size]

    def draw(self, scene: Scene) -> Image.Image:
        picture = Image.new("RGB", (SIDE, SIDE), scene.background)
        for part in scene.parts:
            figure = self.sprite(part.sprite, part.size)
            picture.paste(figure, (round(part.x - part.size / 2), round(part.y - part.size / 2)), figure)
        return picture

    def array(self, scene: Scene) -> np.ndarray:
        """(128, 128, 3) uint8."""
        return np.asarray(self.draw(scene))
