"""evaluate(): what is known about adapters together, as one report for people and machines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusion.adapters.adapter import Adapter
from fusion.composition.verdict import Compatibility, compatibility
from fusion.errors import ConfigError
from fusion.evaluation.survival import CONCEPT_FREE, PROMPTS, Survival, measure_survival


@dataclass(frozen=True)
class Evaluation:
    """Weight-space and model-space measures of adapters used together."""

    compatibility: Compatibility
    gated: Survival  # as the files say
    ungated: Survival  # as a plain LoRA export would behave

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """A table: one row per concept."""
        measured = self.compatibility.interference
        lines = [
            f"**{self.compatibility.verdict}**: {self.compatibility.sentence}",
            "",
            "| concept | output error | the same as plain LoRA |",
            "|---|---|---|",
            *(
                f"| {token} | {error:.3f} | {self.ungated.output_error[token]:.3f} |"
                for token, error in self.gated.output_error.items()
            ),
            f"| drift on concept-free prompts | {self.gated.drift:.4f} | {self.ungated.drift:.4f} |",
            "",
            "Output error: 0 as if alone, 1 disturbed by as much as the concept itself changes.",
            f"Energy of the sum over the strongest adapter: {measured.energy_ratio:.2f}.",
        ]
        return "\n".join(lines)


def evaluate(
    pipe: Any,
    adapters: Sequence[Adapter],
    *,
    prompts: Sequence[str] = PROMPTS,
    concept_free: Sequence[str] = CONCEPT_FREE,
    seed: int = 0,
) -> Evaluation:
    """Measure adapters together on a base: in their weights, and in what the UNet says.

    `prompts` hold "{token}" where each concept goes. Raises ConfigError without adapters, and whatever attach raises.
    """
    if not adapters:
        raise ConfigError("There is nothing to evaluate; give at least one adapter.")
    measures = [
        measure_survival(pipe, adapters, gating=gating, prompts=prompts, concept_free=concept_free, seed=seed)
        for gating in (None, "none")
    ]
    return Evaluation(compatibility(adapters, pipe), *measures)
