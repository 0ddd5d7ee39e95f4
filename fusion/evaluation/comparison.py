"""compare(): one prompt and seed, drawn over strengths × methods × adapters, each picture with measured numbers.

    kept    = 1 − output error of a concept on its own prompt: 1 as its file alone draws it, 0 as far off as the base
    leakage = drift of prompts without any concept: 0 nothing leaks into them

Both are read from what the UNet says (survival.py), so they hold for the setting, not for one lucky picture.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from PIL import Image

from fusion.adapters.adapter import Adapter
from fusion.composition.fusing import fuse
from fusion.errors import ConfigError
from fusion.evaluation.output_error import CONCEPT_FREE, concept_question, concepts_of, free_question
from fusion.generation.drawing import Picture, generate
from fusion.models.attachment import attach
from fusion.models.pipeline import Pipeline

ALONE = "alone"
MOST = 64  # pictures


@dataclass(frozen=True)
class Cell:
    """One picture of the grid, and what its setting does."""

    number: int  # 1 … total
    total: int
    strength: float  # the grid's row; times each adapter's own
    column: str  # a fusion method, or "<token> alone"
    picture: Picture
    kept: dict[str, float]  # token -> how much of it survives
    leakage: float

    def to_text(self) -> str:
        """What stands under the picture."""
        numbers = [f"{token} kept {share:.0%}" for token, share in self.kept.items()]
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
    steps: int | None = None,
    on_step: Callable[[int, int, Callable[[], Image.Image]], None] | None = None,
) -> Generator[Cell]:
    """Draw the grid, row by row: every strength by every method, and with `alone` by every adapter alone.

    `own_strengths` weigh the adapters against each other; `steps` and `on_step` as in generate.
    Raises ConfigError for a grid that is empty or of more than 64 pictures, and whatever fuse and generate raise.
    """
    own = [1.0] * len(adapters) if own_strengths is None else list(own_strengths)
    settings: list[tuple[str, list[Adapter], str, list[float]]] = []
    if adapters:
        settings += [(method, list(adapters), method, own) for method in methods]
    if alone:
        for adapter, weight in zip(adapters, own, strict=True):
            tokens = " ".join(concept.token for concept in adapter.info.concepts) or adapter.info.name
            settings.append((f"{tokens} {ALONE}", [adapter], "direct_sum", [weight]))
    total = len(settings) * len(strengths)
    if not 0 < total <= MOST:
        raise ConfigError(f"A grid has 1 to {MOST} pictures, not {total}; pick concepts, methods and strengths for it.")
    ready = [
        (strength, name, fuse(parts, [strength * weight for weight in weights], method, pipe=pipe))
        for strength in strengths
        for name, parts, method, weights in settings
    ]
    questions = {
        token: concept_question(pipe, single, [f"a {token}"], seed)
        for adapter in adapters
        for token, single in concepts_of(adapter).items()
    }
    free = free_question(pipe, list(CONCEPT_FREE[:2]), seed)
    for number, (strength, name, fused) in enumerate(ready, start=1):
        (picture,) = generate(pipe, prompt, adapters=[fused], seed=seed, steps=steps, on_step=on_step)
        known = [concept.token for concept in fused.info.concepts]
        with attach(pipe, fused):
            kept = {token: max(0.0, 1.0 - questions[token].error(pipe)) for token in known if token in questions}
            leakage = free.error(pipe)
        yield Cell(number, total, strength, name, picture, kept, leakage)
