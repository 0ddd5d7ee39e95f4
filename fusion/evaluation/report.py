"""evaluate(): what is known about adapters together, as one report for people and machines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from PIL import Image

from fusion.adapters.adapter import Adapter, nouns
from fusion.composition.compatibility_report import Compatibility, compatibility
from fusion.errors import ConfigError
from fusion.evaluation.clip_judge import Judge
from fusion.evaluation.first_step_forecast import foresee
from fusion.evaluation.identity import PAIR, SINGLE, Identity, Scene, measure_identity
from fusion.evaluation.output_error import CONCEPT_FREE, PROMPTS, Survival, concepts_of, measure_survival
from fusion.generation.drawing import generate
from fusion.models.input_moments import record_moments
from fusion.models.pipeline import Pipeline

LEGEND = "Output error: 0 as if alone, 1 disturbed by as much as the concept itself changes."
SEEN = "Retention: likeness to the references, 1 as drawn by its adapter alone, 0 as the base draws the noun."


@dataclass(frozen=True)
class Evaluation:
    """Weight-space and model-space measures of adapters used together."""

    compatibility: Compatibility
    gated: Survival  # as the files say
    ungated: Survival  # as a plain LoRA export would behave
    identity: Identity | None = None  # where there are references to judge pictures by

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str]]:
        """A heading, one row per concept, and the drift."""
        errors = [(token, error, self.ungated.output_error[token]) for token, error in self.gated.output_error.items()]
        return [
            ("output error", "as the files say", "as plain LoRA, ungated"),
            *((token, f"{now:.3f}", f"{plain:.3f}") for token, now, plain in errors),
            ("drift without concepts", f"{self.gated.drift:.4f}", f"{self.ungated.drift:.4f}"),
        ]

    def seen_rows(self) -> list[tuple[str, ...]]:
        """A heading and one row per concept, of what the judge sees in pictures; empty without references."""
        found = self.identity
        if found is None:
            return []
        pairs = found.pair_retention or [None] * len(found.tokens)
        return [
            ("pictures", "noun", "alone", "retention", "retention in pairs", "leaks most"),
            *(
                (
                    token,
                    f"{found.floor[i]:.2f}",
                    f"{found.alone[i]:.2f}",
                    str(found.retention[i]),
                    str(pairs[i] or "-"),
                    self._worst_leak(i),
                )
                for i, token in enumerate(found.tokens)
            ),
        ]

    def _worst_leak(self, i: int) -> str:
        assert self.identity is not None
        others = [(leak, token) for leak, token in zip(self.identity.leakage[i], self.identity.tokens, strict=True)]
        others.pop(i)
        return "{1} {0:+.2f}".format(*max(others)) if others else "-"

    def remarks(self) -> list[str]:
        """What the numbers mean, and how far the judge is to be believed."""
        lines = [LEGEND]
        if self.identity:
            lines.append(
                f"{SEEN} Judge: {self.identity.judge}, which tells {self.identity.reliability:.0%} of the references "
                f"apart. Asked for and missing: {self.identity.omission:.0%} of crops; more like another concept: "
                f"{self.identity.redundancy:.0%}."
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
                *(table(self.seen_rows()) if self.identity else []),
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
) -> Evaluation:
    """Measure adapters together on a base: in their weights, and in what the UNet says.

    `prompts` hold "{token}" where each concept goes; there are defaults for them and for `concept_free`. With
    `references`, pictures of some or all concepts by their tokens, and a `judge`, also in pictures of `scenes`, prompts
    with {first} and with {second} on its right, from `seeds` seeds, and compatibility foresees who spoils whom. With
    `activations`, it also listens to the inputs of every changed layer, which takes their second moments in memory: I²
    numbers a layer and adapter. Raises ConfigError without adapters, or for references of other tokens, and whatever
    attach raises.
    """
    if not adapters:
        raise ConfigError("There is nothing to evaluate; give at least one adapter.")
    texts = {"prompts": prompts or PROMPTS, "concept_free": concept_free or CONCEPT_FREE}
    identity = foresight = None
    if references:
        drawn = range(seed, seed + seeds)
        judge = _checked(adapters, references, judge)
        foresight = foresee(pipe, adapters, references, judge, prompt=scenes[0], seeds=drawn)
        identity = _identity(pipe, adapters, references, judge, drawn, scenes)
    gated, ungated = measure_survival(pipe, adapters, (None, "none"), **texts, seed=seed)
    moments = None
    if activations:
        moments = record_moments(
            pipe, adapters, prompts=texts["prompts"], concept_free=texts["concept_free"], seed=seed
        )
    return Evaluation(compatibility(adapters, pipe, moments, foresight), gated, ungated, identity)


def _checked(
    adapters: Sequence[Adapter], references: Mapping[str, Sequence[Image.Image]], judge: Judge | None
) -> Judge:
    """The judge, when there is one and the references are of known concepts."""
    known = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    if judge is None or any(not pictures for pictures in references.values()):
        raise ConfigError(
            "Pictures are judged by a CLIP model against references: give a judge, and one or more of each."
        )
    if strange := [token for token in references if token not in known]:
        raise ConfigError(f"No adapter knows {strange[0]}; references are needed for {', '.join(known) or 'nothing'}.")
    return judge


def _identity(
    pipe: Pipeline,
    adapters: Sequence[Adapter],
    references: Mapping[str, Sequence[Image.Image]],
    judge: Judge,
    seeds: Sequence[int],
    scenes: tuple[str, str],
) -> Identity:
    def draw(using: Sequence[Adapter], prompt: str, at: int) -> Image.Image:
        return generate(pipe, prompt, adapters=using, seed=at)[0].image

    single = {token: partial(draw, [one]) for adapter in adapters for token, one in concepts_of(adapter).items()}
    scene = Scene(partial(draw, []), single, partial(draw, adapters), nouns(adapters))
    return measure_identity(scene, judge, references, seeds, single=scenes[0], pair=scenes[1])
