"""Checkpoints of a training: safetensors and JSON, enough to continue bit by bit.

Noise, timesteps and data order of step k are functions of the seed and k alone, so the step number is all the random
state there is.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion.errors import ConfigError, FormatError

_FOLDER = re.compile(r"checkpoint-(\d+)")
_TENSORS, _STATE = "state.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    extra: Mapping[str, Any],
    *,
    limit: int | None,
) -> Path:
    """Write `folder`/checkpoint-<step>, whole or not at all, and keep the newest `limit`.

    `parameters` in the optimizer's order; `extra` is small JSON: the settings that must not change on resuming.
    """
    target = folder / f"checkpoint-{step}"
    working = folder / f".checkpoint-{step}.writing"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, working / _TENSORS)
    state = {"step": step, "scheduler": _plain(scheduler.state_dict()), **extra}
    (working / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    working.rename(target)
    for old in checkpoints(folder)[: -limit if limit else None] if limit else []:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _FOLDER.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def find_checkpoint(asked: str, folder: Path) -> Path:
    """The checkpoint `--resume_from_checkpoint` means: "latest", a name in `folder`, or a path."""
    if asked == "latest":
        found = checkpoints(folder)
        if not found:
            raise ConfigError(
                f"There is no checkpoint in '{folder}' to resume from; train without --resume_from_checkpoint."
            )
        return found[-1]
    for candidate in (folder / asked, Path(asked)):
        if (candidate / _STATE).is_file():
            return candidate
    raise ConfigError(f"'{asked}' is no checkpoint; 'latest' takes the newest in '{folder}'.")


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    extra: Mapping[str, Any],
) -> int:
    """Put everything back and return the number of steps done. Raises ConfigError where the settings differ."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(path / _TENSORS)
    except (OSError, ValueError) as error:
        raise FormatError(f"Checkpoint '{path}' cannot be read: {error}.") from error
    for key, value in extra.items():
        if state.get(key) != value:
            raise ConfigError(
                f"Checkpoint '{path}' was made with {key} = {state.get(key)!r}, not {value!r}; use that again."
            )
    named = {key.removeprefix("parameter."): value for key, value in tensors.items() if key.startswith("parameter.")}
    if named.keys() != parameters.keys():
        strange = sorted(named.keys() ^ parameters.keys())[0]
        raise ConfigError(f"Checkpoint '{path}' holds other parameters than this training, first {strange}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(named[name])
            optimizer.state[parameter] = _optimizer_state(tensors, name, parameter)
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    return int(state["step"])


def _optimizer_state(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> dict[str, Tensor]:
    keys = [key for key in tensors if key.startswith("optimizer.") and key.split(".", 2)[2] == name]
    # AdamW keeps its step counter on the CPU; everything shaped like the parameter goes beside it.
    return {
        key.split(".", 2)[1]: tensors[key].to(like.device) if tensors[key].shape == like.shape else tensors[key]
        for key in keys
    }


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if isinstance(value, int | float | list | bool | str)}
