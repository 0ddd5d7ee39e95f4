"""evaluate(): what is known about adapters together, as one report for people and machines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusion.adapters.adapter import Adapter
from fusion.composition.verdict import Compatibility, compatibility
from fusion.errors import ConfigError
from fusion.evaluation.survival import CONCEPT_FREE, PROMPTS, Survival, measure_survival

LEGEND = "Output error: 0 as if alone, 1 disturbed by as much as the concept itself changes."


@dataclass(frozen=True)
class Evaluation:
    """Weight-space and model-space measures of adapters used together."""

    compatibility: Compatibility
    gated: Survival  # as the files say
    ungated: Survival  # as a plain LoRA export would behave

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

    def to_markdown(self) -> str:
        heading, *rows = (f"| {' | '.join(row)} |" for row in self.rows())
        return "\n".join(
            [
                f"**{self.compatibility.verdict}**: {self.compatibility.sentence}\n",
                *(heading, "|---|---|---|", *rows),
                f"\n{LEGEND}",
                f"Energy of the sum over the strongest adapter: {self.compatibility.interference.energy_ratio:.2f}.",
            ]
        )


def evaluate(
    pipe: Any,
    adapters: Sequence[Adapter],
    *,
    prompts: Sequence[str] | None = None,
    concept_free: Sequence[str] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure adapters together on a base: in their weights, and in what the UNet says.

    `prompts` hold "{token}" where each concept goes; there are defaults for them and for `concept_free`.
    Raises ConfigError without adapters, and whatever attach raises.
    """
    if not adapters:
        raise ConfigError("There is nothing to evaluate; give at least one adapter.")
    texts = {"prompts": prompts or PROMPTS, "concept_free": concept_free or CONCEPT_FREE}
    gated, ungated = measure_survival(pipe, adapters, (None, "none"), **texts, seed=seed)
    return Evaluation(compatibility(adapters, pipe), gated, ungated)
