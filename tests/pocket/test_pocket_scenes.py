"""Scenes and captions of pocket's training: drawn from their seed alone, true in what they say, silent on what is
held out. The sprites here are synthetic, so nothing is fetched."""

import random

import numpy as np
import pytest

from tools.pocket import subjects
from tools.pocket.artwork import Sprite
from tools.pocket.captions import article, caption, plain_caption, plural
from tools.pocket.scenes import ARRANGEMENTS, Painter, Palette, compose
from tools.pocket.views import claim, cut, foils, holds, view

NAMES = ["fox", "red-apple", "octopus", "stopwatch"]
STYLES = ["noto", "flat", "outline"]
INDEX = [Sprite(style, name, name.replace("-", " ")) for style in STYLES for name in NAMES]
SEEN = ["noto", "flat"]


@pytest.fixture(scope="module")
def painter():
    sprites = np.zeros((len(INDEX), 128, 128, 4), np.uint8)
    for k, sprite in enumerate(sprites):
        sprite[8:-8, 8:-8] = (20 * k, 255 - 20 * k, 90, 255)
    return Painter(sprites)


@pytest.fixture(scope="module")
def palette():
    return Palette(INDEX, ["fox", "red-apple"], SEEN, emphasis={"fox": 2.0})


def test_the_lists_are_disjoint():
    lists = [subjects.FIRST, subjects.SECOND, subjects.OTHERS, subjects.HELD_OUT, subjects.UNTOUCHED]
    names = [name for names in lists for name in names]
    assert len(names) == len(set(names))
    assert len(subjects.TRAINED) >= 160
    assert len(subjects.UNTOUCHED) >= 40


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_a_scene_depends_on_its_seed_alone(kind, painter, palette):
    one, two = (compose(random.Random(7), palette, kind) for _ in range(2))
    assert one == two
    assert np.array_equal(painter.array(one), Painter(painter.sprites).array(two))
    assert caption(one, INDEX, random.Random(3)) == caption(two, INDEX, random.Random(3))


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_held_out_artwork_never_appears(kind, palette):
    rng = random.Random(0)
    for _ in range(200):
        scene = compose(rng, palette, kind)
        used = [INDEX[part.sprite] for part in scene.parts]
        assert {sprite.subject for sprite in used} <= {"fox", "red-apple"}
        assert {sprite.style for sprite in used} <= set(SEEN)
        words = caption(scene, INDEX, rng)
        assert not any(word in words for word in ("octopus", "stopwatch", "outline"))


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_things_stand_where_the_caption_says(kind, palette):
    centres = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
    rng = random.Random(1)
    for _ in range(50):
        scene = compose(rng, palette, kind, jitter=1.0)
        words = plain_caption(scene, INDEX)
        assert words.endswith(f"on a {scene.colour} background")
        for part in scene.parts:
            assert INDEX[part.sprite].label in words or plural(INDEX[part.sprite].label) in words
            assert part.place in words or kind in ("alone", "twins")
            for word in part.place.split():
                if word in centres:
                    axis, sign = centres[word]
                    assert ((part.x, part.y)[axis] - 64) * sign > 0


def test_parts_lie_within_the_picture_and_their_cut_shows_them(painter, palette):
    scene = compose(random.Random(2), palette, "four", sprites=[0, 1, 4, 5])
    picture = painter.draw(scene)
    for part in scene.parts:
        middle = np.asarray(cut(picture, "four", part.place))[64, 64]
        assert abs(middle.astype(int) - painter.sprites[part.sprite][64, 64, :3]).max() <= 2


def test_claims_hold_of_what_they_were_made_of(painter, palette):
    rng = random.Random(4)
    for _ in range(40):
        seen = view(rng, painter, palette, palette.sprite(rng))
        assert seen.picture.shape == (128, 128, 3)
        assert holds(claim(rng, palette, seen), seen, palette)
        wrong = foils(rng, palette, seen)
        assert {c.style for c in wrong} >= set(palette.styles) - {INDEX[seen.sprite].style}
        assert not any(holds(c, seen, palette) for c in wrong)


def test_words():
    assert [article("fox"), article("octopus")] == ["a fox", "an octopus"]
    assert [plural(w) for w in ("red apple", "cherries", "cherry", "fox", "bus")] == [
        *("red apples", "cherries", "cherries", "foxes", "bus"),
    ]
