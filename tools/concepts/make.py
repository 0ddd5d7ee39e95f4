"""Draw the example concepts of `assets/concepts` and those of `benchmarks/concepts` from openly licensed artwork.

Every concept is a subject (sometimes also a drawing style) that pocket, the embedded base, has never been shown.
The benchmark has three nouns more, and for each of the eight nouns a look-alike by another hand.
A concept's folder holds four pictures of it alone and four beside subjects that pocket knows, captioned in pocket's
grammar. The proportions are those of pocket's own training scenes. The same artwork gives the same files.

    npm install --prefix artwork @iconify-json/fluent-emoji@1.2.7 @iconify-json/fluent-emoji-flat@1.2.6 \\
        @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/streamline-emojis@1.2.4 \\
        @iconify-json/twemoji@1.2.5 @iconify-json/emojione@1.2.3 @iconify-json/fxemoji@1.2.2
    pip install pillow resvg-py
    python tools/concepts/make.py --artwork artwork
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import resvg_py  # pyright: ignore[reportMissingImports] (no part of the lock: only this command needs it)
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PICTURE = 128  # px; trainers shrink it to what their base draws
ALONE, BESIDE = 100, 56  # px, the longer side of a subject alone and of each of two
LEFT, MIDDLE, RIGHT = 34, 64, 94  # px, centres
SHIFTS = ((0, 0), (2, -1), (-2, 1), (1, 2))  # px; so that the place is not learned to the pixel
RENDER = 512  # px, before cropping and shrinking
BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))  # an icon's view box; Iconify's defaults
OPAQUE = 16  # of 255; fainter pixels (soft shadows) do not count as content when cropping

COLOURS = {
    "white": (250, 250, 250),
    "black": (20, 20, 24),
    "red": (214, 60, 56),
    "orange": (240, 150, 60),
    "yellow": (248, 214, 90),
    "green": (90, 170, 90),
    "blue": (80, 130, 215),
    "purple": (140, 95, 190),
    "pink": (244, 160, 190),
    "brown": (130, 90, 65),
    "teal": (70, 170, 175),
}


class Companion(NamedTuple):
    """A subject pocket knows (in its default style, noto), and the colour of the background."""

    subject: str
    colour: str


class Example(NamedTuple):
    """One concept: `icon` of the Iconify set `artwork`."""

    noun: str
    artwork: str
    icon: str
    alone: tuple[str, str, str, str]  # background colours
    right: tuple[Companion, Companion]  # stand on the right, the concept on the left
    left: tuple[Companion, Companion]
    masks: bool = False
    hand: str = ""  # tells concepts of one noun apart

    @property
    def name(self) -> str:
        return f"{self.noun}-{self.hand}" if self.hand else self.noun

    @property
    def token(self) -> str:
        return f"<{self.name}>"


EXAMPLES = (
    Example(
        "octopus",
        "fluent-emoji",
        "octopus",
        ("blue", "white", "black", "teal"),
        right=(Companion("banana", "green"), Companion("guitar", "yellow")),
        left=(Companion("sailboat", "purple"), Companion("mushroom", "red")),
        masks=True,
    ),
    Example(
        "robot",
        "noto",
        "robot",
        ("yellow", "pink", "purple", "white"),
        right=(Companion("guitar", "green"), Companion("banana", "blue")),
        left=(Companion("rocket", "orange"), Companion("bell", "teal")),
    ),
    Example(
        "owl",
        "fluent-emoji-flat",
        "owl",
        ("blue", "yellow", "pink", "green"),
        right=(Companion("mushroom", "teal"), Companion("rocket", "orange")),
        left=(Companion("red apple", "white"), Companion("cactus", "purple")),
    ),
    Example(
        "unicorn",
        "twemoji",
        "unicorn",
        ("yellow", "green", "black", "red"),
        right=(Companion("rainbow", "pink"), Companion("hammer", "white")),
        left=(Companion("gem stone", "brown"), Companion("balloon", "teal")),
    ),
    Example(
        "pumpkin",
        "streamline-emojis",
        "jack-o-lantern",
        ("blue", "purple", "white", "teal"),
        right=(Companion("ghost", "pink"), Companion("key", "yellow")),
        left=(Companion("skull", "green"), Companion("cactus", "orange")),
    ),
)

COMPANIONS = ("banana", "guitar", "sailboat", "mushroom", "rocket", "bell", "cactus", "key", "balloon", "rainbow")


def benched(noun: str, artwork: str, icon: str, turn: int, hand: str = "") -> Example:
    """A concept of the benchmark; `turn` deals out backgrounds and company."""
    colours = [list(COLOURS)[(4 * k + turn) % len(COLOURS)] for k in range(len(COLOURS))]
    company = [Companion(COMPANIONS[(3 * k + turn) % len(COMPANIONS)], colours[4 + k]) for k in range(4)]
    alone = (colours[0], colours[1], colours[2], colours[3])
    return Example(noun, artwork, icon, alone, (company[0], company[1]), (company[2], company[3]), hand=hand)


BENCHED = (
    benched("snowman", "noto-v1", "snowman", 0),
    benched("dragon", "emojione", "dragon-face", 1),
    benched("volcano", "fluent-emoji", "volcano", 2),
    benched("octopus", "noto", "octopus", 3, "noto"),
    benched("robot", "twemoji", "robot", 4, "tweet"),
    benched("owl", "noto-v1", "owl", 5, "blob"),
    benched("unicorn", "fluent-emoji", "unicorn", 6, "glossy"),
    benched("pumpkin", "noto", "jack-o-lantern", 7, "noto"),
    benched("snowman", "streamline-emojis", "snowman", 8, "outline"),
    benched("dragon", "fluent-emoji-flat", "dragon-face", 9, "flat"),
    benched("volcano", "fxemoji", "volcano", 10, "fox"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artwork", type=Path, required=True, help="the folder given to npm install --prefix")
    parser.add_argument("--output", type=Path, default=ROOT, help="default: %(default)s")
    options = parser.parse_args()
    packages = options.artwork / "node_modules" / "@iconify-json"
    if not packages.is_dir():
        parser.error(f"{packages} is missing: see the npm install line above")
    for home, examples in (("assets", EXAMPLES), ("benchmarks", BENCHED)):
        for example in examples:
            folder = options.output / home / "concepts" / example.name
            draw(example, packages, folder)
            print(f"{example.token}: eight pictures in {folder}")


def draw(example: Example, packages: Path, folder: Path) -> None:
    """Write one concept's pictures, captions, masks and card."""
    folder.mkdir(parents=True, exist_ok=True)
    subject = sprite(packages / example.artwork, example.icon)
    for number, (picture, mask, caption) in enumerate(scenes(example, subject, packages), start=1):
        picture.save(folder / f"{number:02}.png", optimize=True)
        (folder / f"{number:02}.txt").write_text(caption + "\n", encoding="utf-8")
        if example.masks:
            (folder / "masks").mkdir(exist_ok=True)
            mask.save(folder / "masks" / f"{number:02}.png", optimize=True)
    (folder / "concept.toml").write_text(card(example, packages / example.artwork), encoding="utf-8")


def scenes(example: Example, subject: Image.Image, packages: Path) -> Iterator[tuple[Image.Image, Image.Image, str]]:
    """Yield picture (RGB), mask (L, white where the concept is) and caption: four alone, four with company."""
    me = f"a {example.token}"
    for colour, (dx, dy) in zip(example.alone, SHIFTS, strict=True):
        picture, mask = canvas(colour)
        paste(picture, mask, subject, ALONE, MIDDLE + dx, MIDDLE + dy)
        yield picture, mask, f"{me} on a {colour} background"
    places = [*((c, LEFT, RIGHT) for c in example.right), *((c, RIGHT, LEFT) for c in example.left)]
    for companion, at, other in places:
        picture, mask = canvas(companion.colour)
        paste(picture, mask, subject, BESIDE, at, MIDDLE)
        known = sprite(packages / "noto", companion.subject.replace(" ", "-"))
        paste(picture, None, known, BESIDE, other, MIDDLE)
        left, right = (me, f"a {companion.subject}") if at == LEFT else (f"a {companion.subject}", me)
        yield picture, mask, f"{left} on the left and {right} on the right on a {companion.colour} background"


def canvas(colour: str) -> tuple[Image.Image, Image.Image]:
    size = (PICTURE, PICTURE)
    return Image.new("RGB", size, COLOURS[colour]), Image.new("L", size)


def paste(picture: Image.Image, mask: Image.Image | None, figure: Image.Image, size: int, x: int, y: int) -> None:
    """Put a square RGBA figure of `size` px around (x, y)."""
    small = figure.resize((size, size), Image.Resampling.LANCZOS)
    corner = (x - size // 2, y - size // 2)
    picture.paste(small, corner, small)
    if mask is not None:
        mask.paste(small.getchannel("A"), corner)


def sprite(package: Path, icon: str) -> Image.Image:
    """Render one icon, crop it to its content and centre it on a transparent square (RGBA)."""
    data = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    entry = data["icons"][icon]
    box = [entry.get(key, data.get(key, default)) for key, default in BOX]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER}" height="{RENDER}" viewBox="{" ".join(map(str, box))}">{entry["body"]}</svg>'
    )
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    image = image.crop(image.getchannel("A").point([255 * (alpha > OPAQUE) for alpha in range(256)]).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def card(example: Example, package: Path) -> str:
    """`concept.toml`: what the trainer needs, and where the artwork comes from."""
    info = json.loads((package / "info.json").read_text(encoding="utf-8"))
    release = json.loads((package / "package.json").read_text(encoding="utf-8"))
    entries = {
        "token": example.token,
        "noun": example.noun,
        "artwork": info["name"],
        "author": info["author"]["name"],
        "licence": info["license"]["spdx"],
        "licence_url": info["license"]["url"],
        "source": info["author"]["url"],
        "package": f"{release['name']} {release['version']}",
        "icon": f"{info['prefix']}:{example.icon}",
        "changes": "cropped, on plain backgrounds; in 05 to 08 beside a Noto Emoji figure (Apache-2.0)",
    }
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items())


if __name__ == "__main__":
    main()
