"""Scenes and captions of pocket's training: drawn from their seed alone, true in what they say, silent on what is
held out. The sprites here are synthetic, so nothing is fetched."""

import random
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.pocket import artwork, card, subjects
from tools.pocket.artwork import Sprite
from tools.pocket.captions import article, caption, captioned_scenes, plain_caption, plural
from tools.pocket.painting import Painter, as_tensor
from tools.pocket.scenes import ARRANGEMENTS, UNITS, Palette, compose
from tools.pocket.settings import Settings, read_settings
from tools.pocket.views import claim, cut, foils, holds, pictures_of, view

NAMES = ["fox", "red-apple", "octopus", "stopwatch"]
STYLES = ["noto", "flat", "outline"]
INDEX = [Sprite(style, name, name.replace("-", " ")) for style in STYLES for name in NAMES]
SEEN = ["noto", "flat"]
ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def painter():
    sprites = np.zeros((len(INDEX), 128, 128, 4), np.uint8)
    for k, sprite in enumerate(sprites):
        sprite[8:-8, 8:-8] = (20 * k, 255 - 20 * k, 90, 255)
    return Painter(sprites, 128)


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
    assert np.array_equal(painter.arrays([one]), Painter(painter.sprites.numpy(), 128).arrays([two]))
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
    for side in (128, 256):
        picture = as_tensor(Painter(painter.sprites.numpy(), side).arrays([scene]))[0]
        for k, part in enumerate(scene.parts):
            middle = cut(picture, scene, k)[:, 64, 64].add(1).mul(127.5)
            assert (middle - painter.sprites[part.sprite][64, 64, :3]).abs().max() <= 2


def test_claims_hold_of_what_they_were_made_of(painter, palette):
    rng = random.Random(4)
    for _ in range(40):
        seen = view(rng, palette, palette.sprite(rng))
        assert holds(claim(rng, palette, seen), seen, palette)
        wrong = foils(rng, palette, seen)
        assert {c.style for c in wrong} >= set(palette.styles) - {INDEX[seen.sprite].style}
        assert not any(holds(c, seen, palette) for c in wrong)


def test_words():
    assert [article(w) for w in ("fox", "octopus", "sparkles")] == ["a fox", "an octopus", "sparkles"]
    assert article("flat style grapes", "grapes") == "flat style grapes" and article("the bus") == "a the bus"
    assert {plural(one): one for one in PLURALS.values()} == PLURALS


PLURALS = {
    **{"red apples": "red apple", "cherries": "cherries", "sparkles": "sparkles", "foxes": "fox", "buses": "bus"},
    **{"ears of corn": "ear of corn", "glasses of milk": "glass of milk", "maple leaves": "maple leaf"},
    **{"couches and lamps": "couch and lamp", "mouse faces": "mouse face", "mice": "mouse", "game dice": "game die"},
    **{"leaves fluttering in wind": "leaf fluttering in wind", "cherry blossoms": "cherry blossom"},
    **{"tropical fish": "tropical fish", "strawberries": "strawberry", "fish cakes with swirl": "fish cake with swirl"},
    **{"turkeys": "turkey", "potatoes": "potato", "water buffaloes": "water buffalo", "cactuses": "cactus"},
}


@pytest.mark.parametrize("kind", ["alone", "twins", "beside"])
def test_nothing_in_the_plural_has_an_article(kind):
    index = [Sprite("flat", "grapes", "grapes"), Sprite("noto", "fox", "fox")]
    palette = Palette(index, ["grapes"], ["flat"], emphasis={})
    scenes, captions = captioned_scenes("seed", palette, {kind: 1}, 200)
    words = [*captions, *(plain_caption(scene, index) for scene in scenes)]
    assert not [text for text in words if re.search(r"\ba (flat style )?grapes|grapeses", text)]
    assert captioned_scenes("seed", palette, {kind: 1}, 200) == (scenes, captions)


def test_scenes_are_painted_as_pillow_draws_them(palette):
    rng = np.random.default_rng(0)
    soft = np.asarray(Image.fromarray(rng.integers(0, 255, (12, 12, 4), dtype=np.uint8)).resize((128, 128)))
    sprites = np.stack([soft] * len(INDEX))
    for side in (128, 192):
        scenes = [compose(random.Random(k), palette, kind, jitter=1.0) for k, kind in enumerate(ARRANGEMENTS)]
        painter = Painter(sprites, side)
        for scene, picture in zip(scenes, painter.arrays(scenes), strict=True):
            expected = Image.new("RGB", (side, side), scene.background)
            for part in scene.parts:
                size = round(part.size * side / UNITS)
                figure = Image.fromarray(soft).resize((size, size), Image.Resampling.LANCZOS)
                corner = [round(at * side / UNITS - size / 2) for at in (part.x, part.y)]
                expected.paste(figure, tuple(corner), figure)
            assert np.abs(picture.astype(int) - np.asarray(expected)).max() <= 3
        x = painter.paint(scenes, [(9, 40)] * len(scenes), 64)
        assert np.allclose(x, painter.paint(scenes)[:, :, 40:104, 9:73], atol=1e-5)


def test_views_are_the_judges_size_and_degraded_by_their_seeds(painter, palette):
    rng = random.Random(3)
    views = [view(rng, palette, palette.sprite(rng)) for _ in range(12)]
    x = pictures_of(views, Painter(painter.sprites.numpy(), 192))
    assert x.shape == (12, 3, 128, 128) and x.abs().max() < 1 + 1e-5
    assert {bool(one.blur) for one in views} == {bool(one.noise) for one in views} == {True, False}
    assert np.array_equal(x, pictures_of(views, Painter(painter.sprites.numpy(), 192)))


def test_sprites_are_packed_without_loss_and_without_pickle(tmp_path, painter):
    (tmp_path / "artwork").mkdir()
    sprites = painter.sprites.numpy()
    artwork.pack(tmp_path / "artwork" / "sprites.npz", sprites, INDEX)
    for _ in range(2):  # unpacked, and read again
        again, index = artwork.load(tmp_path)
        assert index == INDEX
        assert np.array_equal(again[..., 3], sprites[..., 3])
        assert np.array_equal(again[sprites[..., 3] > 0], sprites[sprites[..., 3] > 0])
    bad = np.array([Sprite("noto", "fox", "fox")], dtype=object)
    np.savez(tmp_path / "artwork" / "sprites.npz", index=bad, offsets=bad, blob=bad)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        artwork.load(tmp_path)


def test_a_work_folder_keeps_its_sizes(tmp_path):
    settings = read_settings(tmp_path, side=256, factor=16, channels=8, vocabulary="all")
    assert settings.latent_side == 16 and len(settings.widths) == 5 and len(settings.names) == 336
    assert read_settings(tmp_path) == read_settings(tmp_path, channels=8) == settings
    with pytest.raises(SystemExit, match="has channels 8, not 4"):
        read_settings(tmp_path, channels=4)
    for sizes in ({"side": 100}, {"factor": 16, "widths": (8, 8)}):
        with pytest.raises(SystemExit, match="factor"):
            read_settings(tmp_path / "another", **sizes)
    assert read_settings(tmp_path / "today") == Settings(128, 8, 4, (16, 32, 96, 192), "trained")


@pytest.mark.parametrize("name", ["pocket", "pocket-clip"])
def test_the_cards_are_those_that_are_shipped(name):
    mark = "\n<!-- a mark -->\n"
    shipped = (ASSETS / name / "README.md").read_text(encoding="utf-8")
    parts = card.model_card(name, Settings(), dict.fromkeys(("SUBJECTS", "FIGURES"), mark)).split(mark)
    assert all(part.strip() in shipped for part in parts)
    larger = card.model_card(name, Settings(256, 16, 8, vocabulary="all"), {})
    assert "128 × 128" not in larger and "91.3 %" not in larger


def test_the_settings_of_the_base_are_those_that_are_shipped():
    assert card.base_settings(Settings()) == (ASSETS / "pocket" / "fusion.toml").read_text(encoding="utf-8")
    larger = tomllib.loads(card.base_settings(Settings(256, 16, 8, vocabulary="all")))
    assert larger["training"]["resolution"] == 256 and len(larger["distillation"]["subjects"]) == 336
