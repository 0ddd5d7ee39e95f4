"""What could be known before anything was drawn, against what pictures lose.

For every ordered pair of concepts (i into j), both adapters added and ungated: the share of j's identity that pictures
of j lose, beside what was said of it from weights and recorded inputs (fusion.cross_talk) and from the UNet's first
step (fusion.forecast).
"""

from itertools import permutations
from typing import Any

import numpy as np

import fusion
from benchmarks.laboratory.concepts import Concept
from benchmarks.laboratory.drawing import with_adapters
from benchmarks.laboratory.scoring import Laboratory
from fusion.evaluation.clip_judge import similarity

VERSION = 2
RECIPES = ("lora", "spectral-open")


def predict(laboratory: Laboratory, recipe: str, concepts: list[Concept]) -> dict[str, Any]:
    """Rows (into, from, heard, foreseen, lost, halves), one for each ordered pair."""
    files = laboratory.files(recipe, concepts)
    inputs = {"recipe": recipe, "adapters": [f.parent.name for f in files], "version": VERSION}
    return laboratory.store.numbers("prediction", inputs, lambda: _measure(laboratory, recipe, concepts))


def _measure(laboratory: Laboratory, recipe: str, concepts: list[Concept]) -> dict[str, Any]:
    pipe, judge, seeds = laboratory.school.pipe, laboratory.judge, laboratory.seeds
    files = laboratory.files(recipe, concepts)
    adapters = [fusion.load(file) for file in files]
    references = {concept.token: concept.references() for concept in concepts}
    heard = fusion.cross_talk(pipe, adapters, fusion.record_moments(pipe, adapters)).ratio
    foreseen = fusion.forecast(pipe, adapters, references, judge, prompt=laboratory.prompts.single, seeds=seeds).lost
    rows: list[dict[str, Any]] = []
    for j, i in permutations(range(len(concepts)), 2):
        asked, noun = (laboratory.prompts.single.format(first=w) for w in (concepts[j].token, concepts[j].noun))
        low, high = min(i, j), max(i, j)  # the order of adapters does not matter, so a pair is attached once
        both = laboratory.drawer(
            "both", [files[low], files[high]], lambda a=low, b=high: with_adapters(pipe, [adapters[a], adapters[b]])
        )
        own = [judge.pictures(references[concepts[j].token])]
        drawn = (both, asked), (laboratory.alone(files[j]), asked), (laboratory.base, noun)
        now, before, floor = (
            similarity(judge.pictures([draw(prompt, seed) for seed in seeds]), own)[:, 0].numpy()
            for draw, prompt in drawn
        )
        shares = (before - now) / (before.mean() - floor.mean())
        rows.append(
            {
                "into": concepts[j].name,
                "from": concepts[i].name,
                "heard": heard[i][j],
                "foreseen": foreseen[i][j],
                "lost": float(shares.mean()),
                "halves": [float(part.mean()) for part in np.array_split(shares, 2)],
            }
        )
    return {"recipe": recipe, "rows": rows}


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: Pearson's of the ranks. Not a number where there are no two of them."""
    if len(first) < 2:
        return float("nan")
    a, b = (np.argsort(np.argsort(values)).astype(float) for values in (first, second))
    return float(np.corrcoef(a, b)[0, 1])
