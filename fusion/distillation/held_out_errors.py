"""How exactly a student does what its teacher does, on prompts that it has not learned from.

    error = Σ ‖k' − k‖² / Σ ‖k − k₀‖²    on prompts with concepts, k₀ the base's with the concepts' embeddings alone:
                                         0 the same as the gated set, 1 as if there were no adapters
    drift = Σ ‖k' − k‖² / Σ ‖k‖²         on prompts without any concept, where k is the base's

over prompts and positions, the mean over the keys and values of all layers.
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class HeldOutErrors:
    one: float  # error on prompts with one concept
    several: float | None  # with two or three; None where there is one concept only
    drift: float  # on prompts without concepts
    pooled: float | None = None  # error of SDXL's pooled embedding on prompts with one concept

    def to_json(self) -> dict[str, float]:
        """For an adapter's file."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: object) -> "HeldOutErrors | None":
        """What `to_json` wrote into a file; None for anything else."""
        if not isinstance(values, dict) or not {"one", "drift"} <= values.keys() <= {*cls.__dataclass_fields__}:
            return None
        numbers: dict[str, float | None] = {"several": None, **values}
        return cls(**numbers) if all(isinstance(v, int | float) for v in values.values()) else None  # pyright: ignore

    def sentence(self, concepts: int) -> str:
        """One line for people."""
        whole = "what the adapter does" if concepts == 1 else f"what the {concepts} concepts do"
        pairs = "" if self.several is None else f", {_share(1 - self.several)} where several stand in one prompt"
        return f"keeps {_share(1 - self.one)} of {whole}{pairs}; other prompts change by {_share(self.drift)}"

    def within(self, limit: float) -> bool:
        return max(self.one, self.several or 0.0) <= limit


def _share(value: float) -> str:
    """`99.3 %`, `0.02 %`."""
    percent = 100 * max(value, 0.0)
    return f"{percent:.1f} %" if percent >= 1 else f"{percent:.1g} %"
