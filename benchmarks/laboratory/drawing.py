"""Pictures of prompts and seeds, stored in cells: one for a prompt and all its seeds, drawn as one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

import fusion
from benchmarks.laboratory.arms import Draw
from benchmarks.laboratory.store import Store

VERSION = 1  # of the pictures; a larger number draws all of them again


@dataclass
class Drawer:
    """`drawer(prompt, seed)`: a picture, from its cell or drawn now.

    `inputs` identify what draws, for the cells' hashes; `open_draw` returns it when something must be drawn.
    """

    store: Store
    inputs: dict[str, Any]
    seeds: Sequence[int]  # consecutive
    open_draw: Callable[[], Draw]
    _pictures: dict[str, list[Image.Image]] = field(default_factory=dict[str, list[Image.Image]])

    def __call__(self, prompt: str, seed: int) -> Image.Image:
        if prompt not in self._pictures:
            self._pictures[prompt] = self._all(prompt)
        return self._pictures[prompt][self.seeds.index(seed)]

    def _all(self, prompt: str) -> list[Image.Image]:
        def make(folder: Path) -> None:
            images = self.open_draw()(prompt, self.seeds[0], len(self.seeds))
            for seed, image in zip(self.seeds, images, strict=True):
                image.save(folder / f"{seed}.png")

        inputs = {**self.inputs, "prompt": prompt, "seeds": list(self.seeds), "version": VERSION}
        folder = self.store.cell("pictures", inputs, make)
        return [Image.open(folder / f"{seed}.png").convert("RGB") for seed in self.seeds]


def with_adapters(pipe: Any, adapters: Sequence[fusion.Adapter]) -> Draw:
    """Draw with the gates of the adapters' files, without fusing."""

    def draw(prompt: str, seed: int, batch: int) -> list[Image.Image]:
        config = fusion.GenerationConfig(prompt=prompt, seed=seed, num_images=batch)
        return [picture.image for picture in fusion.generate(pipe, config, adapters)]

    return draw
