"""Checkpoints of trainings: `fusion.formats.checkpoint_file` with the slice, and those of earlier versions.

    <output_dir>/checkpoints/<output name>/<run>/checkpoint-<step>/state.safetensors

Checkpoints of earlier versions, without a run, lie directly under the output name, with a state.json beside the
tensors.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fusion.errors import FormatError, FusionError
from fusion.formats import checkpoint_file
from fusion.formats.checkpoint_file import Checkpoint, CheckpointState
from fusion.spectral.slices import SpectralSlice

EARLIER_FILE = "state.json"
_EARLIER_NAMES = {"examples": "pictures", "slices": "slice"}


def find_checkpoint(name: str, folder: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a training for `--resume_from_checkpoint`, made with the same lasting `settings`."""
    return checkpoint_file.find_checkpoint(name, folder, partial(read_checkpoint, settings=settings))


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """As `checkpoint_file.read_checkpoint`. A `slice` of None among the settings is any slice."""
    fixed = {key: value for key, value in settings.items() if (key, value) != ("slice", None)}
    checkpoint = checkpoint_file.read_checkpoint(path, fixed, _earlier_state)
    slice_of(checkpoint)
    return checkpoint


def slice_of(checkpoint: Checkpoint) -> SpectralSlice | None:
    """The slice that the training has. Raises FormatError for numbers that are no slice."""
    numbers = checkpoint.state.lasting.get("slice")
    try:
        return None if numbers is None else SpectralSlice.from_json(numbers)
    except (FusionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"Checkpoint '{checkpoint.path}' cannot be read: {error}") from error


def _earlier_state(path: Path) -> CheckpointState:
    """The state in an earlier version's state.json, under today's names."""
    state = json.loads((path / EARLIER_FILE).read_text(encoding="utf-8"))
    settings = {_EARLIER_NAMES.get(key, key): value for key, value in state["settings"].items()}
    if isinstance(slices := settings.get("slice"), list):
        settings["slice"] = slices[0] if slices else None
    return CheckpointState.model_validate({"step": state["scheduler"]["last_epoch"], "lasting": settings})
