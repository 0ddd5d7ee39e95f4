"""What could be known before anything was drawn: does cross-talk predict leakage?

For every ordered pair of concepts (i into j), both adapters added and ungated: how much a picture of j loses of its
identity, and gains of i's, against what fusion.cross_talk said from weights and recorded inputs.
"""

from itertools import permutations
from typing import Any

import numpy as np

import fusion
from benchmarks.laboratory.concepts import Concept
from benchmarks.laboratory.drawing import with_adapters
from benchmarks.laboratory.scoring import VERSION, Laboratory
from fusion.evaluation.judge import likeness

RECIPES = ("lora", "spectral-open")


def predict(laboratory: Laboratory, recipe: str, concepts: list[Concept]) -> dict[str, Any]:
    """Rows (into, from, said, lost, gained), one for each ordered pair."""
    files = laboratory.files(recipe, concepts)
    inputs = {"recipe": recipe, "adapters": [f.parent.name for f in files], "version": VERSION}
    return laboratory.store.numbers("prediction", inputs, lambda: _measure(laboratory, recipe, concepts))


def _measure(laboratory: Laboratory, recipe: str, concepts: list[Concept]) -> dict[str, Any]:
    pipe, judge = laboratory.school.pipe, laboratory.judge
    files = laboratory.files(recipe, concepts)
    adapters = [fusion.load(file) for file in files]
    said = fusion.cross_talk(pipe, adapters, fusion.record_moments(pipe, adapters)).ratio
    own = [judge.pictures(concept.references()) for concept in concepts]
    rows: list[dict[str, Any]] = []
    for j, i in permutations(range(len(concepts)), 2):
        prompt = laboratory.prompts.single.format(first=concepts[j].token)
        low, high = min(i, j), max(i, j)  # the order of adapters does not matter, so a pair is attached once
        both = laboratory.drawer(
            "both", [files[low], files[high]], lambda a=low, b=high: with_adapters(pipe, [adapters[a], adapters[b]])
        )
        alone = laboratory.alone(files[j])
        now, before = (
            likeness(judge.pictures([draw(prompt, s) for s in laboratory.seeds]), own).mean(dim=0)
            for draw in (both, alone)
        )
        rows.append(
            {
                "into": concepts[j].name,
                "from": concepts[i].name,
                "said": said[i][j],
                "lost": float(before[j] - now[j]),
                "gained": float(now[i] - before[i]),
            }
        )
    return {"recipe": recipe, "rows": rows}


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: Pearson's of the ranks."""
    a, b = (np.argsort(np.argsort(values)).astype(float) for values in (first, second))
    return float(np.corrcoef(a, b)[0, 1])
