"""Gated concepts distilled into plain LoRAs, stored in cells with what the distillations took and measured."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fusion
from benchmarks.laboratory.trainer import Trainer

DEFAULTS: Mapping[str, Any] = {}  # no setting differs from its default
VERSION = 7  # of fusion/distillation; a larger number distils, draws and scores again


@dataclass(frozen=True)
class Distillation:
    """How an arm's adapters are distilled: `each` into a file of its own, or all into one; with other `settings`."""

    each: bool = False
    settings: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)


def distilled(trainer: Trainer, files: Sequence[Path], distillation: Distillation) -> list[Path]:
    """The files of plain LoRAs, one for each of `files` or one for all."""
    sets = [[file] for file in files] if distillation.each else [list(files)]
    return [_distilled(trainer, some, distillation.settings) for some in sets]


def costs(files: Sequence[Path]) -> dict[str, Any]:
    """How many files, and the largest of each number over them: minutes of one core, bytes, held-out errors."""
    rows = [json.loads(file.with_name("result.json").read_text(encoding="utf-8")) for file in files]
    return {"files": len(files)} | {key: max(row[key] for row in rows) for key in rows[0] if rows[0][key] is not None}


def _distilled(trainer: Trainer, files: Sequence[Path], settings: Mapping[str, Any]) -> Path:
    config = fusion.DistillationConfig(**{"checkpointing_steps": 0, **trainer.distillation, **settings})

    def make(folder: Path) -> None:
        adapters, start = [fusion.load(file) for file in files], time.process_time()
        *_, last = fusion.distill(trainer.pipe, adapters, config)
        minutes = (time.process_time() - start) / 60
        fusion.save(last.adapter, folder / "adapter.safetensors")
        fusion.export(last.adapter, folder / "export.safetensors", "kohya")
        size = sum(file.stat().st_size for file in folder.glob("export*.safetensors"))
        result = {"minutes": minutes, "bytes": size, **asdict(last.errors)}
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"distilled {len(adapters)} concepts in {minutes:.1f} minutes of a core: {last.errors}", flush=True)

    inputs = {
        "base": trainer.base_digest,
        "adapters": [file.parent.name for file in files],
        "settings": {**config.lasting_settings(), "decoys": config.decoys_for(len(files))},
        "version": VERSION,
    }
    return trainer.store.cell("distilled", inputs, make) / "adapter.safetensors"
