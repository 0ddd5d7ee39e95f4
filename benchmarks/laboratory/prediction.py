"""What pictures lose, and how well it is predicted before anything is drawn.

For every ordered pair of concepts (i into j), with both adapters ungated: the share of j's identity that pictures of j
lose, and its predictions from weights and recorded inputs (fusion.cross_talk, stored as "heard") and from the UNet's
first step (fusion.forecast, stored as "foreseen").
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
    pipe, judge, seeds = laboratory.trainer.pipe, laboratory.judge, laboratory.seeds
    files = laboratory.files(recipe, concepts)
    adapters = [fusion.load(file) for file in files]
    references = {concept.token: concept.references() for concept in concepts}
    responses = fusion.cross_talk(pipe, adapters, fusion.record_moments(pipe, adapters)).ratio
    losses = fusion.forecast(pipe, adapters, references, judge, prompt=laboratory.prompts.single, seeds=seeds).lost
    rows: list[dict[str, Any]] = []
    for j, i in permutations(range(len(concepts)), 2):
        prompt, noun = (laboratory.prompts.single.format(first=w) for w in (concepts[j].token, concepts[j].noun))
        low, high = min(i, j), max(i, j)  # the order of adapters does not matter, so each pair is drawn once
        both = laboratory.drawer(
            "both", [files[low], files[high]], lambda a=low, b=high: with_adapters(pipe, [adapters[a], adapters[b]])
        )
        vectors = [judge.pictures(references[concepts[j].token])]
        drawers = (both, prompt), (laboratory.alone(files[j]), prompt), (laboratory.base, noun)
        now, before, floor = (
            similarity(judge.pictures([draw(text, seed) for seed in seeds]), vectors)[:, 0].numpy()
            for draw, text in drawers
        )
        shares = (before - now) / (before.mean() - floor.mean())
        rows.append(
            {
                "into": concepts[j].name,
                "from": concepts[i].name,
                "heard": responses[i][j],
                "foreseen": losses[i][j],
                "lost": float(shares.mean()),
                "halves": [float(part.mean()) for part in np.array_split(shares, 2)],
            }
        )
    return {"recipe": recipe, "rows": rows}


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's: Pearson's of the ranks. NaN for fewer than two."""
    if len(first) < 2:
        return float("nan")
    a, b = (np.argsort(np.argsort(values)).astype(float) for values in (first, second))
    return float(np.corrcoef(a, b)[0, 1])
