"""Scores of pictures: one for an arm and a set of concepts.

retention, leakage, omission, redundancy   as in fusion.evaluate, over pictures of one concept and of pairs
beside     similarity of a concept beside an ordinary thing, drawn by all and by its adapter alone, less its noun's
drift      1 − cosine of the judge's vectors of the arm's and the base's pictures, on prompts without concepts
nouns      the same for the concepts' own nouns
error, said_drift   output error and drift of the UNet's predictions (fusion.evaluation.output_error), if fused
distillation        what it took and measured, if distilled
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
from benchmarks.laboratory.distilling import Distillation, costs, distilled
from benchmarks.laboratory.drawing import Drawer, with_adapters
from benchmarks.laboratory.recipes import RECIPES
from benchmarks.laboratory.store import Store, digest
from benchmarks.laboratory.trainer import RATE, Trainer
from fusion.evaluation import identity, output_error
from fusion.evaluation.clip_judge import Judge, open_judge, similarity

VERSION = 1
SCORE = 2  # of the scores alone; a larger number scores the stored pictures again


@dataclass(frozen=True)
class Prompts:
    """Prompts in pocket's grammar."""

    single: str = "a {first} on a blue background"
    pair: str = "a {first} on the left and a {second} on the right on a yellow background"
    ordinary: tuple[str, ...] = ("banana", "rocket", "mushroom", "bell")  # the second of a pair, in turn
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
    """Scores arms on sets of concepts; all pictures and numbers are stored."""

    store: Store
    trainer: Trainer
    judge_folder: Path
    seeds: Sequence[int]
    prompts: Prompts = Prompts()
    rates: dict[str, float] = field(default_factory=dict[str, float])  # recipe -> learning rate chosen by a search
    _prepared: dict[tuple[str, tuple[str, ...]], tuple[Prepared, float]] = field(default_factory=dict)
    _references: dict[tuple[str, str], output_error.ReferencePrediction] = field(default_factory=dict)

    @cached_property
    def judge(self) -> Judge:
        return open_judge(self.judge_folder, device=self.trainer.device)

    def files(self, recipe: str, concepts: Sequence[Concept]) -> list[Path]:
        return [self.adapter_file(recipe, concept, k) for k, concept in enumerate(concepts)]

    def adapter_file(self, recipe: str, concept: Concept, k: int) -> Path:
        return self.trainer.adapter_file(concept, recipe, k, self.rates.get(RECIPES[recipe].rate_of or recipe, RATE))

    def files_in_use(self, name: str, files: Sequence[Path]) -> Sequence[Path]:
        """The files that an arm draws with: the concepts' own, or what is distilled from them."""
        arm = arms()[name]
        if arm.styled:
            return [*files, self.trainer.style_file()]
        return distilled(self.trainer, files, arm.distillation) if arm.distillation else files

    def at_rank(self, recipe: str, concepts: Sequence[Concept], rank: int) -> Path:
        """The concepts distilled into one plain LoRA of this rank."""
        return distilled(self.trainer, self.files(recipe, concepts), Distillation(settings={"rank": rank}))[0]

    def drawer(self, name: str, files: Sequence[Path], open_draw: Any) -> Drawer:
        inputs = {"base": self.trainer.base_digest, "arm": name, "adapters": [file.parent.name for file in files]}
        return Drawer(self.store, inputs, self.seeds, open_draw)

    @cached_property
    def base(self) -> Drawer:
        return self.without_fusion("base", [])

    def alone(self, file: Path) -> Drawer:
        return self.without_fusion("alone", [file])

    def without_fusion(self, name: str, files: Sequence[Path]) -> Drawer:
        """The base with the adapters of these files, each as its file says."""
        return self.drawer(name, files, lambda: with_adapters(self.trainer.pipe, [fusion.load(f) for f in files]))

    def prepared(self, name: str, files: Sequence[Path]) -> tuple[Prepared, float]:
        """The prepared arm, and the seconds that took."""
        key = name, tuple(file.parent.name for file in files)
        if key not in self._prepared:
            self._prepared.clear()  # one at a time: dense merges are large
            adapters, start = [fusion.load(file) for file in files], time.perf_counter()
            self._prepared[key] = arms()[name].prepare(self.trainer.pipe, adapters), time.perf_counter() - start
        return self._prepared[key]

    def together(self, name: str, concepts: Sequence[Concept], files: Sequence[Path]) -> identity.Draw:
        """An arm's pictures; of prompts with one concept or none, those of its `single` arm."""

        def drawer(arm: str) -> Drawer:
            used = self.files_in_use(arm, files)
            return self.drawer(arm, used, lambda: self.prepared(arm, used)[0].draw)

        several, single = drawer(name), drawer(arms()[name].single or name)

        def draw(prompt: str, seed: int) -> Image.Image:
            count = sum(concept.token in prompt for concept in concepts)
            return (several if count > 1 else single)(prompt, seed)

        return draw

    def score(self, name: str, concepts: Sequence[Concept], *, pairs: bool = True) -> dict[str, Any]:
        """One arm on one set; without `pairs`, only pictures of one concept and of none."""
        files = self.files(arms()[name].recipe, concepts)
        inputs = {
            **self._inputs(name, files),
            "judge": digest(*self.judge_folder.glob("*.safetensors")),
            "seeds": list(self.seeds),
            "pairs": pairs,
            "prompts": vars(self.prompts),
            "version": SCORE,
        }
        return self.store.numbers("score", inputs, lambda: self._measure(name, concepts, files, pairs))

    def _measure(self, name: str, concepts: Sequence[Concept], files: Sequence[Path], pairs: bool) -> dict[str, Any]:
        together = self.together(name, concepts, files)
        style = [self.trainer.style_file()] if arms()[name].styled else []
        alone = {c.token: self.without_fusion("alone", [file, *style]) for c, file in zip(concepts, files, strict=True)}
        base = self.without_fusion("base", style)
        nouns = {concept.token: concept.noun for concept in concepts}
        scene = identity.Scene(base, alone, together, nouns)
        references = {concept.token: concept.references() for concept in concepts}
        tokens = [concept.token for concept in concepts]
        ring = [*pairwise(tokens), (tokens[-1], tokens[0])] if pairs and len(tokens) > 1 else []
        result = identity.measure_identity(
            scene, self.judge, references, self.seeds, single=self.prompts.single, pair=self.prompts.pair, pairs=ring
        )
        return {
            "arm": name,
            "concepts": [concept.name for concept in concepts],
            "identity": asdict(result),
            "beside": self._beside(concepts, alone, together, result.floor) if pairs else [],
            "drift": self._drift(self.prompts.free, together, base),
            "nouns": self._drift(
                [self.prompts.single.format(first=concept.noun) for concept in concepts], together, base
            ),
            **self.unet_scores(name, concepts, files),
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

    def _drift(self, prompts: Sequence[str], together: Any, base: Drawer) -> float:
        drawings = [(prompt, seed) for prompt in prompts for seed in self.seeds]
        now, before = (self.judge.pictures([draw(*drawing) for drawing in drawings]) for draw in (together, base))
        return float(1 - (now * before).sum(dim=1).mean())

    def unet_scores(self, name: str, concepts: Sequence[Concept], files: Sequence[Path]) -> dict[str, Any]:
        """Errors of the UNet's predictions, seconds to prepare and to draw, and the size of the fused file."""
        inputs = {**self._inputs(name, files), "prompts": vars(self.prompts), "version": VERSION}
        return self.store.numbers("said", inputs, lambda: self._measure_unet(name, concepts, files))

    def _inputs(self, name: str, files: Sequence[Path]) -> dict[str, Any]:
        """What identifies an arm with its adapters, for the cells' hashes."""
        inputs = {"arm": name, "adapters": [file.parent.name for file in files], "base": self.trainer.base_digest}
        used = self.files_in_use(name, files)
        return inputs if used is files else {**inputs, "distilled": [file.parent.name for file in used]}

    def _measure_unet(self, name: str, concepts: Sequence[Concept], files: Sequence[Path]) -> dict[str, Any]:
        used = self.files_in_use(name, files)
        prepared, seconds = self.prepared(name, used)
        start = time.perf_counter()
        prepared.draw(self.prompts.free[0], 0, 1)
        times = {"ready_seconds": round(seconds, 2), "picture_seconds": round(time.perf_counter() - start, 2)}
        if prepared.adapter is None:
            return times
        pipe = self.trainer.pipe
        references = [self._concept_reference(file, concept) for file, concept in zip(files, concepts, strict=True)]
        base = self._base_reference()
        with fusion.attach(pipe, prepared.adapter):
            errors = [reference.error(pipe) for reference in references]
            drift = base.error(pipe)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "fused.safetensors"
            fusion.save(prepared.adapter, file)
            size = file.stat().st_size
        result = {**times, "error": errors, "said_drift": drift, "bytes": size}
        return result if used is files else {**result, "distillation": costs(used)}

    def _concept_reference(self, file: Path, concept: Concept) -> output_error.ReferencePrediction:
        key = file.parent.name, concept.name
        if key not in self._references:
            prompt = self.prompts.single.format(first=concept.token)
            self._references[key] = output_error.concept_reference(self.trainer.pipe, fusion.load(file), [prompt], 0)
        return self._references[key]

    def _base_reference(self) -> output_error.ReferencePrediction:
        if ("", "") not in self._references:
            self._references["", ""] = output_error.base_reference(self.trainer.pipe, list(self.prompts.free[:3]), 0)
        return self._references["", ""]
