"""The concepts of the benchmark: eight nouns that the base has never seen, each by two artists.

The first eight are unlike each other; with the second eight every concept has a look-alike, of the same noun.
"""

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from benchmarks.laboratory.store import digest

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    *("octopus", "robot", "owl", "unicorn", "pumpkin", "snowman", "dragon", "volcano"),
    *("octopus-noto", "robot-tweet", "owl-blob", "unicorn-glossy"),
    *("pumpkin-noto", "snowman-outline", "dragon-flat", "volcano-fox"),
)
ALONE = 4  # pictures of a folder show the concept alone; they are the judge's references


@dataclass(frozen=True)
class Concept:
    """A folder of pictures with captions, and its `concept.toml`."""

    folder: Path

    @cached_property
    def card(self) -> dict[str, str]:
        return tomllib.loads((self.folder / "concept.toml").read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def token(self) -> str:
        return self.card["token"]

    @property
    def noun(self) -> str:
        return self.card["noun"]

    @cached_property
    def digest(self) -> str:
        return digest(*self.folder.glob("*.png"), *self.folder.glob("*.txt"), self.folder / "concept.toml")

    def references(self) -> list[Image.Image]:
        return [Image.open(path).convert("RGB") for path in sorted(self.folder.glob("*.png"))[:ALONE]]


def concepts(names: tuple[str, ...] = NAMES) -> list[Concept]:
    """Those of `assets/concepts` and of `benchmarks/concepts`."""
    parents = (ROOT / "assets" / "concepts", ROOT / "benchmarks" / "concepts")
    return [Concept(next(parent / name for parent in parents if (parent / name).is_dir())) for name in names]
