"""The same small search of the learning rate for every recipe, so that none is judged at another's best rate.

Each of a few concepts is taught at each rate and drawn alone; the rate whose pictures are most like the references
wins, the base's own unless another is clearly better.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.laboratory.concepts import Concept
from benchmarks.laboratory.scoring import VERSION, Laboratory
from benchmarks.laboratory.store import digest
from benchmarks.laboratory.teaching import RATE
from fusion.evaluation.clip_judge import similarity

RATES = (1e-3, RATE, 1e-2)
CLEARLY = 0.02  # likeness; what another set of seeds may change


def search(laboratory: Laboratory, recipe: str, concepts: Sequence[Concept]) -> dict[str, float]:
    """Mean likeness to the references of the concepts drawn alone, for every rate."""
    files = {
        rate: [laboratory.school.taught(concept, recipe, k, rate) for k, concept in enumerate(concepts)]
        for rate in RATES
    }
    inputs = {
        "adapters": [[file.parent.name for file in row] for row in files.values()],
        "judge": digest(*laboratory.judge_folder.glob("*.safetensors")),
        "seeds": list(laboratory.seeds),
        "prompt": laboratory.prompts.single,
        "version": VERSION,
    }
    return laboratory.store.numbers(
        "rates",
        inputs,
        lambda: {
            f"{rate:g}": sum(_seen(laboratory, concept, file) for concept, file in zip(concepts, row, strict=True))
            / len(row)
            for rate, row in files.items()
        },
    )


def _seen(laboratory: Laboratory, concept: Concept, file: Any) -> float:
    draw, judge = laboratory.alone(file), laboratory.judge
    prompt = laboratory.prompts.single.format(first=concept.token)
    pictures = judge.pictures([draw(prompt, seed) for seed in laboratory.seeds])
    return float(similarity(pictures, [judge.pictures(concept.references())]).mean())


def best(found: dict[str, float]) -> float:
    """The rate to teach at."""
    first = max(found, key=found.__getitem__)
    return float(first) if found[first] > found[f"{RATE:g}"] + CLEARLY else RATE
