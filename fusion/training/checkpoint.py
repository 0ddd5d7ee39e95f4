"""Checkpoints of a training: enough to continue bit by bit.

    <output_dir>/checkpoints/<output name>/<run>/checkpoint-<step>/state.safetensors

Noise, timesteps, data order and learning rates of a step are functions of the settings and its number, so the number is
all the random state there is. A run is one training with all its resumptions. It has a random id and a folder of its
own: no run deletes or overwrites what another has written. Checkpoints of earlier versions, without a run, lie directly
under the output name, with a state.json beside the tensors; they are read as well.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fusion.adapters.adapter import content
from fusion.config import StrictModel
from fusion.errors import ConfigError, FormatError, FusionError
from fusion.formats.safetensors_file import opened, write_file
from fusion.spectral.slices import SpectralSlice

logger = logging.getLogger(__name__)

FILE = "state.safetensors"
_EARLIER_FILE = "state.json"  # of versions before 0.2
_EARLIER_NAMES = {"examples": "pictures", "slices": "slice"}
_FOLDER = re.compile(r"checkpoint-(\d{1,9})")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


class _State(StrictModel):
    """What a checkpoint says beside its tensors."""

    run: str = Field("", pattern=r"^([0-9a-f]{8})?$")  # empty in checkpoints of earlier versions
    step: int = Field(ge=1, le=10**9)
    loss: float = Field(math.nan, allow_inf_nan=True)  # NaN in those of earlier versions
    lasting: dict[str, Any]  # settings
    scale: float | None = Field(None, gt=0)  # of the gradient scaler, in fp16
    growth_tracker: int = Field(0, ge=0, lt=2**31)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and checked; only whether its tensors fit a training is left for `restore`."""

    path: Path
    state: _State
    slice: SpectralSlice | None
    tensors: Mapping[str, Tensor]

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Any, scaler: Any) -> None:
        """Put parameters, AdamW's moments and the gradient scaler back. Raises FormatError for shapes that differ."""
        self._check_shapes(parameters, [p for group in optimizer.param_groups for p in group["params"]])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.tensors[f"parameter.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            kind, index, entry = [*key.split(".", 2), ""][:3]
            if kind == "optimizer":
                moments.setdefault(int(index), {})[entry] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if scaler is not None and self.state.scale is not None:
            changes = {"scale": self.state.scale, "_growth_tracker": self.state.growth_tracker}
            scaler.load_state_dict(scaler.state_dict() | changes)

    def _check_shapes(self, parameters: Mapping[str, nn.Parameter], order: list[nn.Parameter]) -> None:
        shapes = {f"parameter.{name}": tuple(parameter.shape) for name, parameter in parameters.items()}
        for index, parameter in enumerate(order):
            moments = {f"optimizer.{index}.{entry}": tuple(parameter.shape) for entry in _MOMENTS}
            if moments.keys() & self.tensors.keys():  # a parameter that had no gradient yet has none of them
                shapes |= moments | {f"optimizer.{index}.step": ()}
        stored = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        for name in sorted(shapes.keys() | stored.keys()):
            if shapes.get(name) != stored.get(name):
                raise FormatError(
                    f"Checkpoint '{self.path}' does not fit this training: {name} is {stored.get(name, 'missing')} "
                    f"there and {shapes.get(name, 'unknown')} here. Resume from another, or train anew."
                )


def save_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, scaler: Any,
    *, run: str, step: int, loss: float, settings: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write the checkpoint `path`, whole or not at all. `settings`: those that must not change on resuming."""
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{entry}": tensor for entry, tensor in moments.items()}
    scale = scaler.state_dict() if scaler is not None else {}
    growth = {"scale": scale["scale"], "growth_tracker": scale["_growth_tracker"]} if scale else {}
    state = _State.model_validate({"run": run, "step": step, "loss": loss, "lasting": dict(settings), **growth})
    text = state.model_dump_json()
    write_file(path / FILE, tensors, {"state": text, "digest": _digest(text, tensors)}, "float32")
    return path


def remove_old_checkpoints(folder: Path, step: int, limit: int) -> None:
    """Keep the newest `limit` checkpoints of a run up to `step`; after resuming from an early one, there are later."""
    for path in [path for number, path in _numbered(folder) if number <= step][:-limit]:
        shutil.rmtree(path)


def find_checkpoint(name: str, folder: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that `--resume_from_checkpoint` means, made with the same lasting `settings`.

    `name`: "latest", "checkpoint-4" or "0f3a…/checkpoint-4" in `folder`, or a path. Of several runs, the one written
    last that has these settings; of its checkpoints the newest that can be read. Raises ConfigError naming the first
    setting that differs, or where there is no such checkpoint; FormatError for one that is damaged.
    """
    paths = [path for path in _newest_first(folder) if name in ("latest", path.name, _below(path, folder))]
    if not paths and _time(Path(name)):
        paths = [Path(name)]
    errors: list[FusionError] = []
    for path in paths:
        try:
            checkpoint = read_checkpoint(path, settings)
        except (ConfigError, FormatError) as error:
            errors.append(error)
        else:
            for error in errors:
                logger.warning("%s Resuming from '%s'.", error, path)
            return checkpoint
    if errors:
        raise next((error for error in errors if isinstance(error, ConfigError)), errors[0])
    if name == "latest":
        raise ConfigError(f"'{folder}' holds no checkpoint to resume from; train without --resume_from_checkpoint.")
    raise ConfigError(f"'{name}' is no checkpoint; 'latest' takes the newest in '{folder}'.")


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """Raises FormatError for a damaged checkpoint, ConfigError for the first of `settings` that it has otherwise."""
    with opened(path / FILE) as file:
        text = file.metadata.get("state", "")
        try:
            state = _State.model_validate_json(text) if text else _earlier_state(path)
            numbers = state.lasting.get("slice")
            directions = None if numbers is None else SpectralSlice.from_json(numbers)
        except (FusionError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"Checkpoint '{path}' cannot be read: {error}") from error
        for key, value in settings.items():
            before = state.lasting.get(key, value)  # what an earlier version does not say is let pass
            if before != value and (key, value) != ("slice", None):  # None: whichever the run has
                raise ConfigError(
                    f"Checkpoint '{path}' was made with {key} = {_short(before)}, not {_short(value)}; use that again, "
                    "or train without --resume_from_checkpoint."
                )
        if state.step > settings["max_train_steps"]:
            raise FormatError(f"Checkpoint '{path}' is damaged: {state.step} of {settings['max_train_steps']} steps.")
        tensors = {name: file.tensor(name) for name in file.shapes}
        if text and _digest(text, tensors) != file.metadata.get("digest"):
            raise FormatError(f"Checkpoint '{path}' is damaged: its content does not match its digest.")
    return Checkpoint(path, state, directions, tensors)


def _earlier_state(path: Path) -> _State:
    """What state.json of an earlier version says, under today's names."""
    state = json.loads((path / _EARLIER_FILE).read_text(encoding="utf-8"))
    settings = {_EARLIER_NAMES.get(key, key): value for key, value in state["settings"].items()}
    if isinstance(slices := settings.get("slice"), list):
        settings["slice"] = slices[0] if slices else None
    return _State(step=state["scheduler"]["last_epoch"], lasting=settings)


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything in the file."""
    sha = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)}".encode() + content(tensors[name].reshape(-1)))
    return sha.hexdigest()


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints directly in a folder with their steps, oldest first."""
    matches = [(path, _FOLDER.fullmatch(path.name)) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for path, match in matches if match and _time(path))


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of every run: first the run that was written last, of each run the latest step first."""
    runs = [[path for _, path in reversed(_numbered(run))] for run in (folder, *folder.glob("*"))]
    return [
        path
        for paths in sorted(runs, key=lambda paths: max(map(_time, paths), default=0), reverse=True)
        for path in paths
    ]


def _time(path: Path) -> int:
    """When a checkpoint was written, in ns; 0 where there is none."""
    try:
        return (path / FILE).stat().st_mtime_ns
    except (OSError, ValueError):  # ValueError: a name no file can have
        return 0


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
