"""evaluate(): all measures of adapters used together, as one report for people and machines."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from PIL import Image

from fusion.adapters.adapter import Adapter, nouns
from fusion.composition.compatibility_report import Compatibility, compatibility
from fusion.config import MAX_SEED, MAX_SEEDS
from fusion.errors import ConfigError
from fusion.evaluation.clip_judge import Judge
from fusion.evaluation.first_step_forecast import forecast
from fusion.evaluation.identity import PAIR, SINGLE, Identity, Scene, measure_identity, picture_count
from fusion.evaluation.output_error import (
    CONCEPT_FREE,
    PROMPTS,
    OutputErrors,
    base_clip_skip,
    concepts_of,
    measure_output_errors,
)  # fmt: skip
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.models.input_moments import record_moments
from fusion.models.pipeline import Pipeline
from fusion.progress import OnProgress

ERROR_LEGEND = "Output error: 0 as if alone, 1 disturbed by as much as the concept itself changes."
RETENTION_LEGEND = (
    "Retention: similarity to the references, 1 as drawn by its adapter alone, 0 as the base draws the noun; – where "
    "its adapter alone adds next to nothing."
)


@dataclass(frozen=True)
class Evaluation:
    """Measures of adapters used together: of their weights, of the UNet's predictions, and of pictures."""

    compatibility: Compatibility
    gated: OutputErrors  # as the files gate them
    ungated: OutputErrors  # as a plain LoRA export would behave
    identity: Identity | None = None  # where there are references to judge pictures by

    def to_json(self) -> dict[str, Any]:
        """Everything; what is not a number is None, as JSON has no other word for it."""
        return _without_nan(asdict(self))

    def rows(self) -> list[tuple[str, str, str]]:
        """A heading, one row per concept, and the drift."""
        errors = [(token, error, self.ungated.output_error[token]) for token, error in self.gated.output_error.items()]
        return [
            ("output error", "gated as in the files", "as plain LoRA, ungated"),
            *((token, f"{gated:.3f}", f"{ungated:.3f}") for token, gated, ungated in errors),
            ("drift without concepts", f"{self.gated.drift:.4f}", f"{self.ungated.drift:.4f}"),
        ]

    def picture_rows(self) -> list[tuple[str, ...]]:
        """A heading and one row per concept, of the judge's results on pictures; empty without references."""
        identity = self.identity
        if identity is None:
            return []
        rows = [("pictures", "noun", "alone", "retention", "retention in pairs", "leaks most")]
        pairs = identity.pair_retention or [None] * len(identity.tokens)
        for i, token in enumerate(identity.tokens):
            floor, alone = f"{identity.floor[i]:.2f}", f"{identity.alone[i]:.2f}"
            rows.append((token, floor, alone, str(identity.retention[i]), str(pairs[i] or "-"), self._worst_leak(i)))
        return rows

    def _worst_leak(self, i: int) -> str:
        assert self.identity is not None
        others = [(leak, token) for leak, token in zip(self.identity.leakage[i], self.identity.tokens, strict=True)]
        others.pop(i)
        return "{1} {0:+.2f}".format(*max(others)) if others else "-"

    def remarks(self) -> list[str]:
        """What the numbers mean, and how reliable the judge is."""
        lines = [ERROR_LEGEND]
        if self.identity:
            lines.append(
                f"{RETENTION_LEGEND} Judge: {self.identity.judge}, which tells {self.identity.reliability:.0%} of the "
                f"references apart. Crops without their concept: {self.identity.omission:.0%}; more similar to "
                f"another concept: {self.identity.redundancy:.0%}."
            )
        return lines

    def to_markdown(self) -> str:
        def table(rows: Sequence[Sequence[str]]) -> list[str]:
            heading, *rest = (f"| {' | '.join(row)} |" for row in rows)
            return ["", heading, "|" + "---|" * len(rows[0]), *rest]

        return "\n".join(
            [
                f"**{self.compatibility.verdict}**: {self.compatibility.sentence}",
                *table(self.rows()),
                *(table(self.picture_rows()) if self.identity else []),
                "",
                *self.remarks(),
                f"Energy of the sum over the strongest adapter: {self.compatibility.interference.energy_ratio:.2f}.",
            ]
        )


def evaluate(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    *,
    prompts: Sequence[str] | None = None,
    concept_free: Sequence[str] | None = None,
    references: Mapping[str, Sequence[Image.Image]] | None = None,
    judge: Judge | None = None,
    scenes: tuple[str, str] = (SINGLE, PAIR),
    seeds: int = 4,
    seed: int = 0,
    activations: bool = False,
    clip_skip: int | None = None,
    num_inference_steps: int | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Measure adapters together on a base: in their weights and in the UNet's predictions.

    `prompts` hold "{token}" where each concept goes; there are defaults for them and for `concept_free`. With
    `references`, pictures of some or all concepts by their tokens, and a `judge`, also in pictures of `scenes` from
    `seeds` seeds (a prompt with {first}, and one with {second} on its right), and with a forecast of which concepts
    disturb each other. With `activations`, also at the inputs of every changed layer, whose second moments take I²
    numbers of memory per layer and adapter. `clip_skip` and `num_inference_steps` as in drawing, by default the base's
    own. `on_progress(done, total)` counts the pictures that are drawn. Raises ConfigError without adapters, or for
    references of other tokens, and whatever attach raises.
    """
    if not adapters:
        raise ConfigError("There is nothing to evaluate; give at least one adapter.")
    if not 1 <= seeds <= MAX_SEEDS:
        raise ConfigError(f"seeds is the number of pictures of each kind, 1 to {MAX_SEEDS}; got {seeds}.")
    if not 0 <= seed <= MAX_SEED - seeds:
        raise ConfigError(f"seed is 0 to {MAX_SEED - seeds}; got {seed}.")
    if clip_skip is None:
        clip_skip = base_clip_skip(pipe)
    texts: dict[str, Any] = {"prompts": prompts or PROMPTS, "concept_free": concept_free or CONCEPT_FREE}
    texts["clip_skip"] = clip_skip
    judge = _checked(adapters, references, judge) if references else None
    gated, ungated = measure_output_errors(pipe, adapters, (None, "none"), **texts, seed=seed)  # checks the prompts
    identity = prediction = None
    if references and judge:
        picture_seeds = range(seed, seed + seeds)
        prediction = forecast(
            pipe, adapters, references, judge, prompt=scenes[0], seeds=picture_seeds, clip_skip=clip_skip
        )
        drawing = {"clip_skip": clip_skip, "num_inference_steps": num_inference_steps}
        drawing = {name: value for name, value in drawing.items() if value is not None}
        identity = _identity(pipe, adapters, references, judge, picture_seeds, scenes, drawing, on_progress)
    moments = record_moments(pipe, adapters, **texts, seed=seed) if activations else None
    return Evaluation(compatibility(adapters, pipe, moments, prediction), gated, ungated, identity)


def _checked(
    adapters: Sequence[Adapter], references: Mapping[str, Sequence[Image.Image]], judge: Judge | None
) -> Judge:
    """The judge, when there is one and the references are of known concepts."""
    known = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    if judge is None or any(not pictures for pictures in references.values()):
        raise ConfigError("A CLIP model compares pictures with references: give a judge, and one or more of each.")
    if unknown := [token for token in references if token not in known]:
        raise ConfigError(f"No adapter knows {unknown[0]}; references are needed for {', '.join(known) or 'nothing'}.")
    return judge


def _identity(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    references: Mapping[str, Sequence[Image.Image]],
    judge: Judge,
    seeds: Sequence[int],
    scenes: tuple[str, str],
    drawing: Mapping[str, Any],
    on_progress: OnProgress | None,
) -> Identity:
    numbers, total = itertools.count(), picture_count(len(references), len(seeds))

    def draw(active: Sequence[Adapter], prompt: str, seed: int) -> Image.Image:
        if on_progress:
            on_progress(next(numbers), total)
        config = GenerationConfig.model_validate({"prompt": prompt, "seed": seed, **drawing})
        return generate(pipe, config, active)[0].image

    single = {token: partial(draw, [one]) for adapter in adapters for token, one in concepts_of(adapter).items()}
    scene = Scene(partial(draw, []), single, partial(draw, adapters), nouns(adapters))
    return measure_identity(scene, judge, references, seeds, single=scenes[0], pair=scenes[1])


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
