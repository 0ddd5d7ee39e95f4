"""Trains a concept by a recipe; the adapter is stored in a cell."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fusion
from benchmarks.laboratory.concepts import Concept
from benchmarks.laboratory.recipes import PLAIN, PLAIN_VERSION, RECIPES, STYLE, TARGETS
from benchmarks.laboratory.store import Store, digest

RATE = 3e-3
PLAIN_RATE = 1e-3  # of plain LoRAs, which change all attention layers


@dataclass(frozen=True)
class Size:
    """The common settings of all trainings; smaller ones for quick runs."""

    rank: int = 4
    steps: int = 150
    batch: int = 6


@dataclass
class Trainer:
    """Trains adapters, each once. The base is opened on first use."""

    store: Store
    size: Size = Size()
    base: str | Path | None = None  # default: pocket
    device: str | None = None
    distillation: Mapping[str, Any] = field(default_factory=dict[str, Any])  # settings of all, if not the defaults

    @cached_property
    def pipe(self) -> Any:
        return self.open()

    @cached_property
    def base_digest(self) -> str:
        """Hash of a local base's weights, or the name of one on the hub."""
        folder = Path(self.base or fusion.pocket())
        return digest(*folder.rglob("*.safetensors")) if folder.is_dir() else str(self.base)

    def open(self) -> Any:
        """Another pipeline, for a training that changes it."""
        return fusion.open_pipeline(self.base, device=self.device)

    def _plain_inputs(self) -> dict[str, Any]:
        return {
            "base": self.base_digest,
            "recipe": PLAIN,
            "rate": PLAIN_RATE,
            "version": PLAIN_VERSION,
            **vars(self.size),
        }

    def style_file(self) -> Path:
        """The LoRA of a style, a plain one."""

        def make(folder: Path) -> None:
            from benchmarks.laboratory import plain_loras

            plain_loras.train_style(self.open(), folder, **vars(self.size), rate=PLAIN_RATE)

        inputs = {**self._plain_inputs(), "style": STYLE}
        return self.store.cell("adapter", inputs, make) / "adapter.safetensors"

    def inputs(self, concept: Concept, recipe: str, k: int, rate: float) -> dict[str, Any]:
        row = RECIPES[recipe]
        if recipe == PLAIN:
            return {**self._plain_inputs(), "concept": concept.digest}
        return {
            "base": self.base_digest,
            "concept": concept.digest,
            "settings": {**row.settings, "slice": row.slice_of(k), "targets": TARGETS, "rate": rate},
            **vars(self.size),
        }

    def adapter_file(self, concept: Concept, recipe: str, k: int, rate: float = RATE) -> Path:
        """The file of the k-th concept's adapter."""

        def make(folder: Path) -> None:
            if recipe == PLAIN:
                from benchmarks.laboratory import plain_loras

                plain_loras.train_concept(self.open(), concept, folder, **vars(self.size), rate=PLAIN_RATE)
                return
            row = RECIPES[recipe]
            config = fusion.TrainingConfig(
                token=concept.token,
                noun=concept.noun,
                instance_data_dir=concept.folder,
                rank=self.size.rank,
                max_train_steps=self.size.steps,
                train_batch_size=self.size.batch,
                slice=row.slice_of(k),
                targets=TARGETS,
                learning_rate=rate,
                text_encoder_lr=rate,
                output_dir=folder,
                output_name=concept.name,
                checkpointing_steps=0,
                use_masks=False,
                **{"quiet_loss_weight": 0.0, **row.settings},  # the base's default would change the other rows
            )
            *_, last = fusion.train(self.pipe, config)
            fusion.save(last.adapter, folder / "adapter.safetensors")
            print(
                f"trained {concept.name} by {recipe} at {rate:g}: loss {last.loss:.3f}, {last.seconds:.0f} s",
                flush=True,
            )

        return self.store.cell("adapter", self.inputs(concept, recipe, k, rate), make) / "adapter.safetensors"
