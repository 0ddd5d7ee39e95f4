"""Stage `artwork`: fetch the icon sets from npm and draw every wanted icon as a square sprite.

Writes `sprites.npy`, (N, 128, 128, 4) uint8 with straight alpha, and `index.json`, one {style, subject, label} a row.
"""

import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.pocket import subjects

SIDE = 128
OPAQUE = 16  # an alpha below is no content when a sprite is cropped
BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))  # of an icon, its set, or Iconify's default

WANTED = [*subjects.TRAINED, *subjects.OTHERS, *subjects.HELD_OUT, *subjects.UNTOUCHED]


@dataclass(frozen=True)
class Sprite:
    style: str
    subject: str
    label: str


def run(work: Path) -> None:
    folder = work / "artwork"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "index.json").exists() and {sprite.subject for sprite in load(work)[1]} == set(WANTED):
        print(f"{folder} has all subjects already")
        return
    fetch(folder)
    sprites, index = rasterise(folder)
    np.save(folder / "sprites.npy", sprites)
    (folder / "index.json").write_text(json.dumps([vars(sprite) for sprite in index], indent=0), encoding="utf-8")
    print(f"{len(index)} sprites of {len({sprite.subject for sprite in index})} subjects in {folder}")


def load(work: Path) -> tuple[np.ndarray, list[Sprite]]:
    """The sprites (N, 128, 128, 4), read from disk as they are needed, and what each shows."""
    folder = work / "artwork"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return np.load(folder / "sprites.npy", mmap_mode="r"), [Sprite(**row) for row in index]


def fetch(folder: Path) -> None:
    if (folder / "node_modules" / "emojibase-data").is_dir():
        return
    # No package here needs its scripts run; pinned versions, so that everybody trains on the same pictures.
    command = ["npm", "install", "--prefix", str(folder), "--no-save", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run([*command, *subjects.STYLES.values(), subjects.LABELS], check=True)


def rasterise(folder: Path) -> tuple[np.ndarray, list[Sprite]]:
    packages = folder / "node_modules"
    labels = read_labels(packages)
    missing = [name for name in WANTED if name not in labels]
    assert not missing, f"no label for {missing}"
    sprites: list[np.ndarray] = []
    index: list[Sprite] = []
    for style, package in subjects.STYLES.items():
        data = json.loads((packages / package.rsplit("@", 1)[0] / "icons.json").read_text(encoding="utf-8"))
        for name in WANTED:
            if name in data["icons"]:  # no set has every subject
                sprites.append(np.asarray(draw(data, name)))
                index.append(Sprite(style, name, labels[name]))
    return np.stack(sprites), index


def read_labels(packages: Path) -> dict[str, str]:
    """Icon name to label: Iconify's names are emojibase's labels without punctuation."""
    rows = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    plain = str.maketrans({"“": "", "”": "", "’": "", "'": "", ":": "", ".": "", ",": "", "!": "", "&": ""})
    return {"-".join(row["label"].lower().translate(plain).split()): row["label"].lower() for row in rows}


def draw(data: dict, name: str) -> Image.Image:
    """Render one icon, crop it to its content and centre it on a transparent square (RGBA)."""
    import resvg_py  # only this stage needs it: pip install resvg-py

    entry = data["icons"][name]
    box = [entry.get(key, data.get(key, default)) for key, default in BOX]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{2 * SIDE}" height="{2 * SIDE}" viewBox="{" ".join(map(str, box))}">{entry["body"]}</svg>'
    )
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    image = image.crop(image.getchannel("A").point([255 * (alpha > OPAQUE) for alpha in range(256)]).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
