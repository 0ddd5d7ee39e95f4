"""compare(): one prompt and seed, drawn over strengths × methods × adapters, each picture with measured numbers.

    retention = 1 − output error of a concept on its own prompt: 1 as its file alone draws it, 0 as far off as the base
    leakage   = drift of prompts without any concept: 0 if they do not change

Both are measured on the UNet's predictions (output_error.py), so they hold for the setting and not for one picture.
"""

import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from PIL import Image

from fusion.adapters.adapter import Adapter, checked_strengths
from fusion.composition.fusing import fuse
from fusion.errors import ConfigError
from fusion.evaluation.output_error import (
    CONCEPT_FREE,
    base_clip_skip,
    base_reference,
    concept_reference,
    concepts_of,
)  # fmt: skip
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.generation.recipe import Picture
from fusion.models.attachment import attach
from fusion.models.pipeline import Pipeline

ALONE = "alone"
MAX_PICTURES = 64


@dataclass(frozen=True)
class Cell:
    """One picture of the grid, and the numbers of its setting."""

    number: int  # 1 … total
    total: int
    strength: float  # the grid's row; times each adapter's own
    column: str  # a fusion method, or "<token> alone"
    picture: Picture
    retention: dict[str, float]  # token -> share of its effect that remains
    leakage: float

    def __getattr__(self, name: str) -> dict[str, float]:
        if name != "kept":
            raise AttributeError(f"a Cell has no attribute '{name}'")
        warnings.warn("Cell.kept is now Cell.retention; the old name goes away in 0.3", FutureWarning, 2)
        return self.retention

    def to_text(self) -> str:
        """The caption of the picture."""
        numbers = [f"{token} kept {share:.0%}" for token, share in self.retention.items()]
        return "\n".join([f"{self.column}, strength {self.strength:g}", *numbers, f"leakage {self.leakage:.3f}"])


def compare(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    prompt: str,
    *,
    own_strengths: Sequence[float] | None = None,
    strengths: Sequence[float] = (0.5, 1.0),
    methods: Sequence[str] = ("direct_sum",),
    alone: bool = False,
    seed: int = 0,
    num_inference_steps: int | None = None,
    clip_skip: int | None = None,
    steps: int | None = None,
    on_step: Callable[[int, int, Callable[[], Image.Image]], None] | None = None,
) -> Generator[Cell]:
    """Draw the grid row by row: every strength by every method, and with `alone` by every adapter alone.

    `own_strengths` weigh the adapters against each other; `num_inference_steps`, `clip_skip` and `on_step` as in
    generate; `steps` is the former name of the first, and warns.
    Raises ConfigError for a grid that is empty or of more than 64 pictures, and whatever fuse and generate raise.
    """
    if steps is not None:
        warnings.warn("compare(steps=) is now num_inference_steps=; the old name goes away in 0.3", FutureWarning, 2)
        num_inference_steps = steps
    drawing = {"num_inference_steps": num_inference_steps, "clip_skip": clip_skip}
    config = GenerationConfig(prompt=prompt, seed=seed).updated(drawing)
    weights = checked_strengths(adapters, own_strengths)
    columns = [(method, list(adapters), method, weights) for method in methods if adapters]
    if alone:
        for adapter, weight in zip(adapters, weights, strict=True):
            tokens = " ".join(concept.token for concept in adapter.info.concepts) or adapter.info.name
            columns.append((f"{tokens} {ALONE}", [adapter], "direct_sum", [weight]))
    total = len(columns) * len(strengths)
    if not 0 < total <= MAX_PICTURES:
        limit = f"A grid has 1 to {MAX_PICTURES} pictures, not {total}"
        raise ConfigError(f"{limit}; pick concepts, methods and strengths for it.")
    settings = [
        (strength, column, fuse(parts, [strength * weight for weight in part_weights], method, pipe=pipe))
        for strength in strengths
        for column, parts, method, part_weights in columns
    ]
    skip = base_clip_skip(pipe, config)
    references = {
        token: concept_reference(pipe, single, [f"a {token}"], seed, skip)
        for adapter in adapters
        for token, single in concepts_of(adapter).items()
    }
    concept_free = base_reference(pipe, list(CONCEPT_FREE[:2]), seed, skip)
    for number, (strength, column, fused) in enumerate(settings, start=1):
        (picture,) = generate(pipe, config, [fused], on_step=on_step)
        tokens = [concept.token for concept in fused.info.concepts if concept.token in references]
        with attach(pipe, fused):
            retention = {token: max(0.0, 1.0 - references[token].error(pipe)) for token in tokens}
            leakage = concept_free.error(pipe)
        yield Cell(number, total, strength, column, picture, retention, leakage)
