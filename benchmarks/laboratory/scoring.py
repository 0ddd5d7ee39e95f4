"""Pictures become numbers: one score for an arm and a set of concepts.

retention, leakage, omission, redundancy   fusion.evaluate's own, over pictures of one concept and of pairs
beside     likeness of a concept beside an ordinary thing, as drawn by all and by its adapter alone, above its noun's
drift      1 − cosine, in the judge's eyes, between what is drawn and what the base draws: prompts without concepts
nouns      the same for the concepts' own nouns
error, said_drift   the same two questions asked of the UNet (fusion.evaluation.output_error); for what is an adapter
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

import fusion
from benchmarks.laboratory.arms import Prepared, arms
from benchmarks.laboratory.concepts import Concept
from benchmarks.laboratory.drawing import Drawer, with_adapters
from benchmarks.laboratory.recipes import RECIPES
from benchmarks.laboratory.store import Store, digest
from benchmarks.laboratory.teaching import RATE, School
from fusion.evaluation import identity, output_error
from fusion.evaluation.clip_judge import Judge, open_judge, similarity

VERSION = 1
SCORE = 2  # of the scores alone; a larger number judges anew what is drawn already


@dataclass(frozen=True)
class Prompts:
    """What is asked for, in pocket's grammar."""

    single: str = "a {first} on a blue background"
    pair: str = "a {first} on the left and a {second} on the right on a yellow background"
    ordinary: tuple[str, ...] = ("banana", "rocket", "mushroom", "bell")  # seconds of pairs, in turn
    free: tuple[str, ...] = (
        "a dog face on a blue background",
        "a fox on the left and a rose on the right on a yellow background",
        "a glossy style lion on a white background",
        "a pizza on a red background",
        "a house on the left and a star on the right on a pink background",
        "a balloon on a green background",
    )


@dataclass
class Laboratory:
    """Scores arms on sets of concepts; everything drawn or measured is kept in the store."""

    store: Store
    school: School
    judge_folder: Path
    seeds: Sequence[int]
    prompts: Prompts = Prompts()
    rates: dict[str, float] = field(default_factory=dict[str, float])  # recipe -> learning rate, where a search chose
    _prepared: dict[tuple[str, tuple[str, ...]], tuple[Prepared, float]] = field(default_factory=dict)
    _questions: dict[tuple[str, str], output_error.ReferencePrediction] = field(default_factory=dict)

    @cached_property
    def judge(self) -> Judge:
        return open_judge(self.judge_folder, device=self.school.device)

    def files(self, recipe: str, concepts: Sequence[Concept]) -> list[Path]:
        return [self.taught(recipe, concept, k) for k, concept in enumerate(concepts)]

    def taught(self, recipe: str, concept: Concept, k: int) -> Path:
        return self.school.taught(concept, recipe, k, self.rates.get(RECIPES[recipe].rate_of or recipe, RATE))

    def drawer(self, what: str, files: Sequence[Path], open_draw: Any) -> Drawer:
        inputs = {"base": self.school.base_digest, "arm": what, "adapters": [file.parent.name for file in files]}
        return Drawer(self.store, inputs, self.seeds, open_draw)

    @cached_property
    def base(self) -> Drawer:
        return self.drawer("base", [], lambda: with_adapters(self.school.pipe, []))

    def alone(self, file: Path) -> Drawer:
        return self.drawer("alone", [file], lambda: with_adapters(self.school.pipe, [fusion.load(file)]))

    def prepared(self, name: str, files: Sequence[Path]) -> tuple[Prepared, float]:
        """What an arm draws with, and the seconds it took to get ready."""
        key = name, tuple(file.parent.name for file in files)
        if key not in self._prepared:
            self._prepared.clear()  # one at a time: dense merges are large
            adapters, begun = [fusion.load(file) for file in files], time.perf_counter()
            self._prepared[key] = arms()[name].prepare(self.school.pipe, adapters), time.perf_counter() - begun
        return self._prepared[key]

    def together(self, name: str, concepts: Sequence[Concept], files: Sequence[Path]) -> identity.Draw:
        """An arm's pictures. One that differs in prompts of several concepts alone leaves the others to another arm."""

        def drawer(what: str) -> Drawer:
            return self.drawer(what, files, lambda: self.prepared(what, files)[0].draw)

        own, plain = drawer(name), drawer(arms()[name].otherwise or name)

        def draw(prompt: str, seed: int) -> Image.Image:
            several = sum(concept.token in prompt for concept in concepts) > 1
            return (own if several else plain)(prompt, seed)

        return draw

    def score(self, name: str, concepts: Sequence[Concept], *, pairs: bool = True) -> dict[str, Any]:
        """One arm on one set; without `pairs`, in pictures of one concept and of none alone."""
        files = self.files(arms()[name].recipe, concepts)
        inputs = {
            "arm": name,
            "adapters": [file.parent.name for file in files],
            "base": self.school.base_digest,
            "judge": digest(*self.judge_folder.glob("*.safetensors")),
            "seeds": list(self.seeds),
            "pairs": pairs,
            "prompts": vars(self.prompts),
            "version": SCORE,
        }
        return self.store.numbers("score", inputs, lambda: self._measure(name, concepts, files, pairs))

    def _measure(self, name: str, concepts: Sequence[Concept], files: Sequence[Path], pairs: bool) -> dict[str, Any]:
        together = self.together(name, concepts, files)
        alone = {concept.token: self.alone(file) for concept, file in zip(concepts, files, strict=True)}
        nouns = {concept.token: concept.noun for concept in concepts}
        scene = identity.Scene(self.base, alone, together, nouns)
        references = {concept.token: concept.references() for concept in concepts}
        tokens = [concept.token for concept in concepts]
        ring = [*pairwise(tokens), (tokens[-1], tokens[0])] if pairs and len(tokens) > 1 else []
        seen = identity.measure_identity(
            scene, self.judge, references, self.seeds, single=self.prompts.single, pair=self.prompts.pair, pairs=ring
        )
        return {
            "arm": name,
            "concepts": [concept.name for concept in concepts],
            "identity": asdict(seen),
            "beside": self._beside(concepts, alone, together, seen.floor) if pairs else [],
            "drift": self._drift(self.prompts.free, together),
            "nouns": self._drift([self.prompts.single.format(first=concept.noun) for concept in concepts], together),
            **self.said(name, concepts, files),
        }

    def _beside(self, concepts: Sequence[Concept], alone: Any, together: Any, floor: Sequence[float]) -> list[Any]:
        rows: list[dict[str, float]] = []
        for k, concept in enumerate(concepts):
            ordinary = self.prompts.ordinary[k % len(self.prompts.ordinary)]
            prompt = self.prompts.pair.format(first=concept.token, second=ordinary)
            references = [self.judge.pictures(concept.references())]
            crops = (
                self.judge.pictures([identity.crop(draw(prompt, seed), identity.LEFT) for seed in self.seeds])
                for draw in (together, alone[concept.token])
            )
            now, before = (similarity(vectors, references) for vectors in crops)
            rows.append({"now": float(now.mean()) - floor[k], "alone": float(before.mean()) - floor[k]})
        return rows

    def _drift(self, prompts: Sequence[str], together: Any) -> float:
        asked = [(prompt, seed) for prompt in prompts for seed in self.seeds]
        now, before = (self.judge.pictures([draw(*one) for one in asked]) for draw in (together, self.base))
        return float(1 - (now * before).sum(dim=1).mean())

    def said(self, name: str, concepts: Sequence[Concept], files: Sequence[Path]) -> dict[str, Any]:
        """What the UNet says, what getting ready and drawing cost, and the size of the fused file: no judge needed."""
        adapters = [file.parent.name for file in files]
        inputs = {"arm": name, "adapters": adapters, "base": self.school.base_digest, "version": VERSION}
        inputs |= {"prompts": vars(self.prompts)}
        return self.store.numbers("said", inputs, lambda: self._ask(name, concepts, files))

    def _ask(self, name: str, concepts: Sequence[Concept], files: Sequence[Path]) -> dict[str, Any]:
        prepared, seconds = self.prepared(name, files)
        begun = time.perf_counter()
        prepared.draw(self.prompts.free[0], 0, 1)
        costs = {"ready_seconds": round(seconds, 2), "picture_seconds": round(time.perf_counter() - begun, 2)}
        if prepared.adapter is None:
            return costs
        pipe = self.school.pipe
        asked = [self._question(file, concept) for file, concept in zip(files, concepts, strict=True)]
        free = self._free()
        with fusion.attach(pipe, prepared.adapter):
            errors = [question.error(pipe) for question in asked]
            drift = free.error(pipe)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "fused.safetensors"
            fusion.save(prepared.adapter, file)
            size = file.stat().st_size
        return {**costs, "error": errors, "said_drift": drift, "bytes": size}

    def _question(self, file: Path, concept: Concept) -> output_error.ReferencePrediction:
        key = file.parent.name, concept.name
        if key not in self._questions:
            prompt = self.prompts.single.format(first=concept.token)
            self._questions[key] = output_error.concept_reference(self.school.pipe, fusion.load(file), [prompt], 0)
        return self._questions[key]

    def _free(self) -> output_error.ReferencePrediction:
        if ("", "") not in self._questions:
            self._questions["", ""] = output_error.base_reference(self.school.pipe, list(self.prompts.free[:3]), 0)
        return self._questions["", ""]
