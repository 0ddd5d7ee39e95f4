"""Checkpoints: parameters, the optimizer's state and the settings, enough to continue bit by bit.

    <folder>/<run>/checkpoint-<step>/state.safetensors

The random draws of a step have to be functions of the settings and its number, so the number is all the random state
there is. A run is one training with all its resumptions; it has a random id and a folder of its own, so that none
deletes or overwrites what another has written.
"""

import hashlib
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fusion.adapters.adapter import content
from fusion.config import StrictModel
from fusion.errors import ConfigError, FormatError, FusionError
from fusion.formats.safetensors_file import opened, write_file
from fusion.output_files import check_output, remove_leftovers

logger = logging.getLogger(__name__)

FILE = "state.safetensors"
_FOLDER = re.compile(r"checkpoint-(\d{1,9})")
_ESTIMATE = ("k", "d", "d_max", "d_numerator")  # Prodigy's learning rate, in its groups


class CheckpointState(StrictModel):
    """What a checkpoint holds beside its tensors."""

    run: str = Field("", pattern=r"^([0-9a-f]{8})?$")  # empty in checkpoints of earlier versions
    step: int = Field(ge=1, le=10**9)
    loss: float = Field(math.nan, allow_inf_nan=True)  # NaN in those of earlier versions
    lasting: dict[str, Any]  # settings
    scale: float | None = Field(None, gt=0)  # of the gradient scaler, in fp16
    growth_tracker: int = Field(0, ge=0, lt=2**31)
    estimates: tuple[dict[str, float], ...] = ()  # of the learning rate by Prodigy, for each group of parameters


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and checked; only whether its tensors fit a training is left for `restore`."""

    path: Path
    state: CheckpointState
    tensors: Mapping[str, Tensor]

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, scaler: GradScaler | None) -> None:
        """Put parameters, optimizer and gradient scaler back. Raises FormatError for shapes that differ."""
        shapes = {f"parameter.{name}": parameter.shape for name, parameter in parameters.items()}
        moments = dict[Tensor, dict[str, Tensor]]()
        for index, (parameter, entries) in enumerate(_initial_state(optimizer)):
            names = {entry: f"optimizer.{index}.{entry}" for entry in entries}
            if any(name in self.tensors for name in names.values()):  # none: it had no gradient yet
                shapes |= {name: torch.as_tensor(entries[entry]).shape for entry, name in names.items()}
                moments[parameter] = {entry: self.tensors[n] for entry, n in names.items() if n in self.tensors}
        stored = {name: tensor.shape for name, tensor in self.tensors.items()}
        if different := sorted(name for name in shapes | stored if shapes.get(name) != stored.get(name)):
            there, here = (list(s[different[0]]) if different[0] in s else "missing" for s in (stored, shapes))
            raise FormatError(
                f"Checkpoint '{self.path}' does not fit this training: {different[0]} is {there} there, {here} here."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.tensors[f"parameter.{name}"])
            for parameter, state in list(optimizer.state.items()):
                if parameter not in moments:
                    del optimizer.state[parameter]
                    continue
                for entry, value in state.items():
                    number = moments[parameter][entry]
                    state[entry] = value.copy_(number) if isinstance(value, Tensor) else type(value)(number)
        for group, numbers in zip(optimizer.param_groups, self.state.estimates, strict=False):
            group.update({entry: numbers[entry] for entry in _ESTIMATE if entry in group and entry in numbers})
        if scaler is not None and self.state.scale is not None:
            changes = {"scale": self.state.scale, "_growth_tracker": self.state.growth_tracker}
            scaler.load_state_dict(scaler.state_dict() | changes)


def _initial_state(optimizer: Optimizer) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """Every parameter with the entries of its state, as the optimizer makes them at its first step.

    That step is taken, with gradients of zero; it may change the parameters.
    """
    parameters = _parameters(optimizer)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [(parameter, optimizer.state[parameter]) for parameter in parameters]


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def save_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, scaler: GradScaler | None,
    *, run: str, step: int, loss: float, settings: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write the checkpoint `path`, whole or not at all. `settings`: those that must not change on resuming."""
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for index, parameter in enumerate(_parameters(optimizer)):
        moments = optimizer.state[parameter].items() if parameter in optimizer.state else ()
        tensors |= {f"optimizer.{index}.{entry}": torch.as_tensor(value).float() for entry, value in moments}
    estimates = [{entry: group[entry] for entry in _ESTIMATE if entry in group} for group in optimizer.param_groups]
    state: dict[str, Any] = {"run": run, "step": step, "loss": loss, "lasting": dict(settings), "estimates": estimates}
    if scaler is not None:
        state |= {"scale": scaler.get_scale(), "growth_tracker": scaler.state_dict()["_growth_tracker"]}
    text = CheckpointState.model_validate(state).model_dump_json()
    write_file(path / FILE, tensors, {"state": text, "digest": _digest(text, tensors)}, "float32")
    return path


def prepare_folder(folder: Path, steps: int) -> None:
    """Remove what killed runs have left half written. Raises OutputError where no checkpoint could be written."""
    remove_leftovers(folder, below=True)
    check_output(folder / "new" / f"checkpoint-{steps}", folder=True)


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the latest step in the folder of a run."""
    return next((path for _, path in reversed(_numbered(run))), None)


class RunCheckpoints:
    """The checkpoints that a run writes: one of a step, every so many steps and at its end; the newest are kept."""

    def __init__(self, folder: Path, every: int, limit: int | None, resumed: int) -> None:
        """`folder` is the run's own, named by its id. `every` 0 writes none, `limit` None keeps all."""
        self.folder, self.every, self.limit = folder, every, limit
        self._saved = resumed  # the step of the latest

    def due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    def save(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, scaler: GradScaler | None,
        *, step: int, loss: float, settings: Mapping[str, Any],
    ) -> Path | None:  # fmt: skip
        """A checkpoint of this step, unless there is one. One that cannot be written is a warning."""
        if step <= self._saved or not self.every:
            return None
        try:
            path = save_checkpoint(
                self.folder / f"checkpoint-{step}", parameters, optimizer, scaler,
                run=self.folder.name, step=step, loss=loss, settings=settings,
            )  # fmt: skip
        except FormatError as error:  # values that are not finite, too
            newest = newest_checkpoint(self.folder)
            name = f"{self.folder.name}/{newest.name}" if newest else ""
            rest = f"can be resumed with --resume_from_checkpoint {name}" if newest else "has none"
            logger.warning("No checkpoint after step %d: %s If training ends early, it %s.", step, error, rest)
            return None
        self._saved = step
        if self.limit:
            remove_old_checkpoints(self.folder, step, self.limit)
        return path


def remove_old_checkpoints(folder: Path, step: int, limit: int) -> None:
    """Keep the newest `limit` checkpoints of a run up to `step`; after resuming from an early one, there are later."""
    for path in [path for number, path in _numbered(folder) if number <= step][:-limit]:
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(name: str, folder: Path, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The checkpoint for `--resume_from_checkpoint`; `read` reads one, and refuses one made with other settings.

    `name`: "latest", "checkpoint-4" or "<run>/checkpoint-4" in `folder`, or a path. Of several runs, the one written
    last that has these settings; of its checkpoints the newest that can be read. Raises ConfigError naming the first
    setting that differs, or where there is no such checkpoint; FormatError for one that is damaged.
    """
    names = {path: ("latest", path.name, path.relative_to(folder).as_posix()) for path in _newest_first(folder)}
    paths = [path for path in names if name in names[path]] or [Path(name)] * bool(_time(Path(name)))
    different, damaged = list[FusionError](), list[FusionError]()
    for path in paths:
        try:
            checkpoint = read(path)
        except ConfigError as error:
            different.append(error)
        except FormatError as error:
            damaged.append(error)
        else:
            for error in damaged:
                logger.warning("%s It is resumed from '%s'.", error, path)
            return checkpoint
    for error in different + damaged:
        raise error
    raise ConfigError(f"There is no checkpoint '{name}' in '{folder}'; start without --resume_from_checkpoint.")


def read_checkpoint(
    path: Path, settings: Mapping[str, Any], earlier: Callable[[Path], CheckpointState] | None = None
) -> Checkpoint:
    """Raises FormatError for a damaged checkpoint, ConfigError for the first of `settings` that it has otherwise.

    `earlier(path)` is the state of a checkpoint whose file holds none, as earlier versions wrote it.
    """
    with opened(path / FILE) as file:
        text = file.metadata.get("state", "")
        try:
            state = earlier(path) if earlier and not text else CheckpointState.model_validate_json(text)
        except (FusionError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"Checkpoint '{path}' cannot be read: {error}") from error
        for key, value in settings.items():
            before = state.lasting.get(key, value)  # what an earlier version did not store is accepted
            if before != value:
                raise ConfigError(
                    f"Checkpoint '{path}' was made with {key} = {before!r}, not {value!r}; use that again, or start "
                    "without --resume_from_checkpoint."
                )
        tensors = {name: file.tensor(name) for name in file.shapes}
        digest = file.metadata.get("digest") if text else _digest(text, tensors)  # earlier versions had none
        if digest != _digest(text, tensors) or state.step > settings["max_train_steps"]:
            raise FormatError(f"Checkpoint '{path}' is damaged: its content does not match its digest or settings.")
    return Checkpoint(path, state, tensors)


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
    runs.sort(key=lambda paths: max(map(_time, paths), default=0), reverse=True)
    return [path for paths in runs for path in paths]


def _time(path: Path) -> int:
    """When a checkpoint was written, in ns; 0 where there is none."""
    try:
        return (path / FILE).stat().st_mtime_ns
    except (OSError, ValueError):  # ValueError: a name no file can have
        return 0
