"""The same small search of the learning rate for every recipe, so that none is measured at another's best rate.

Each of a few concepts is taught at each rate and drawn alone; the rate whose pictures are most similar to the
references is chosen, or the base's own unless another is clearly better.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.laboratory.concepts import Concept
from benchmarks.laboratory.scoring import VERSION, Laboratory
from benchmarks.laboratory.store import digest
from benchmarks.laboratory.trainer import RATE
from fusion.evaluation.clip_judge import similarity

RATES = (1e-3, RATE, 1e-2)
MIN_GAIN = 0.02  # of similarity; as much as another set of seeds may change


def search(laboratory: Laboratory, recipe: str, concepts: Sequence[Concept]) -> dict[str, float]:
    """Mean similarity to the references of the concepts drawn alone, for every rate."""
    files = {
        rate: [laboratory.trainer.adapter_file(concept, recipe, k, rate) for k, concept in enumerate(concepts)]
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
            f"{rate:g}": sum(
                _similarity(laboratory, concept, file) for concept, file in zip(concepts, row, strict=True)
            )
            / len(row)
            for rate, row in files.items()
        },
    )


def _similarity(laboratory: Laboratory, concept: Concept, file: Any) -> float:
    draw, judge = laboratory.alone(file), laboratory.judge
    prompt = laboratory.prompts.single.format(first=concept.token)
    pictures = judge.pictures([draw(prompt, seed) for seed in laboratory.seeds])
    return float(similarity(pictures, [judge.pictures(concept.references())]).mean())


def best(similarities: dict[str, float]) -> float:
    """The learning rate to train with."""
    first = max(similarities, key=similarities.__getitem__)
    return float(first) if similarities[first] > similarities[f"{RATE:g}"] + MIN_GAIN else RATE
