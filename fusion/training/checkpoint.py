"""Checkpoints of a training: safetensors and JSON, enough to continue bit by bit.

Noise, timesteps and data order of step k are functions of the seed and k alone, so the step number is all the random
state there is.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion.errors import ConfigError, FormatError
from fusion.spectral.slices import SpectralSlice

_FOLDER = re.compile(r"checkpoint-(\d+)")
_TENSORS, _STATE = "state.safetensors", "state.json"


def save_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, scheduler: Any, lasting: Mapping[str, Any]
) -> Path:
    """Write the checkpoint `path`, whole or not at all. `lasting`: settings that must not change on resuming."""
    working = path.with_name(f".{path.name}.writing")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    kept = optimizer.state_dict()
    tensors = {f"parameter.{name}": parameter for name, parameter in parameters.items()}
    tensors |= {f"optimizer.{i}.{key}": value for i, state in kept["state"].items() for key, value in state.items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, working / _TENSORS)
    state = {"settings": lasting, "scheduler": _plain(scheduler.state_dict()), "groups": kept["param_groups"]}
    (working / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    return working.rename(path)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _FOLDER.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def find_checkpoint(asked: str, folder: Path) -> Path:
    """The checkpoint `--resume_from_checkpoint` means: "latest", a name in `folder`, or a path."""
    if asked == "latest":
        if found := checkpoints(folder):
            return found[-1]
        raise ConfigError(f"'{folder}' holds no checkpoint to resume from; train without --resume_from_checkpoint.")
    for candidate in (folder / asked, Path(asked)):
        if (candidate / _STATE).is_file():
            return candidate
    raise ConfigError(f"'{asked}' is no checkpoint; 'latest' takes the newest in '{folder}'.")


def slice_of_checkpoint(path: Path) -> SpectralSlice | None:
    """The slice its training was on, where it says so: what was learned there is something else anywhere else."""
    try:
        owned = json.loads((path / _STATE).read_text(encoding="utf-8"))["settings"].get("slices")
        return SpectralSlice.from_json(owned[0]) if owned else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"Checkpoint '{path}' cannot be read: {error}.") from error


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, scheduler: Any, lasting: Mapping[str, Any]
) -> None:
    """Put everything back. Raises FormatError for a broken checkpoint, ConfigError where the settings differ."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(path / _TENSORS)
        settings, scheduled, groups = state["settings"], state["scheduler"], state["groups"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FormatError(f"Checkpoint '{path}' cannot be read: {error}.") from error
    for key, value in lasting.items():
        if (before := settings.get(key, value)) != value:  # what an older checkpoint does not say is let pass
            raise ConfigError(f"Checkpoint '{path}' was made with {key} = {before!r}, not {value!r}; use that again.")
    named, moments = dict[str, Tensor](), defaultdict[int, dict[str, Tensor]](dict)
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "parameter":
            named[name] = value
        else:
            index, _, entry = name.partition(".")
            moments[int(index)][entry] = value
    if strange := sorted(named.keys() ^ parameters.keys()):
        raise ConfigError(f"Checkpoint '{path}' holds other parameters than this training, first {strange[0]}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(named[name])
    optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
    scheduler.load_state_dict(scheduled)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if isinstance(value, int | float | list | bool | str)}
