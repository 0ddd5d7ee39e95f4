"""What must hold in a folder after a command was killed, and after the next one."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import fusion
from fusion.errors import ConfigError
from fusion.formats.safetensors_file import opened
from fusion.training.checkpoint import read_checkpoint

RUN = re.compile(r"(?<![0-9a-z])[0-9a-f]{8}(?![0-9a-z])")  # the id of a training, another one each time
TEMPORARY = "tmp"  # what programs use as the system's temporary folder
LOCKS = (".library.lock", ".lock")
UNFINISHED = ".unfinished"

Contents = dict[str, str]  # path in the folder, ids of trainings as *, -> SHA-256 of what counts


def contents(folder: Path) -> Contents:
    """Every file under its final name. Hidden files, and files in hidden folders, are left out."""
    return {name: digest(file) for name, file in _files(folder) if not _hidden(name)}


def hidden_files(folder: Path) -> set[str]:
    """What lies beside the results, locks left out: parts of files, reservations, unfinished trainings."""
    return {name for name, file in _files(folder) if _hidden(name) and file.name not in LOCKS}


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() or not file.is_dir():
            yield RUN.sub("*", file.relative_to(folder).as_posix()), file


def digest(path: Path) -> str:
    """Of what a file holds, less the random id of a training."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        try:
            data = _without_ids(data)
        except (ValueError, KeyError, TypeError):
            return "damaged"
    return hashlib.sha256(data).hexdigest()[:16]


def _without_ids(data: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header.get("__metadata__", {})
    for key in ("provenance", "state"):
        if key in metadata:
            metadata[key] = json.dumps({k: v for k, v in json.loads(metadata[key]).items() if k != "run"})
    metadata.pop("digest", None)
    return json.dumps(header, sort_keys=True).encode() + data[end:]


def half_results(folder: Path, before: Contents, after: Contents, interim: tuple[str, ...] = ()) -> list[str]:
    """Files that are neither as before the command nor as after it, and what cannot be read of unfinished trainings.

    A file may have its later contents already under its earlier name, when it is renamed. `interim` ones may be of an
    earlier step, but whole.
    """
    problems, whole = [], {*after.values()}
    for name, file in _files(folder):
        parts = Path(name).parts
        if name in interim or file.name == "state.safetensors" or (UNFINISHED in parts and parts[-1][0] != "."):
            problems += _unreadable(name, file)
        elif not _hidden(name) and parts[0] != TEMPORARY and digest(file) not in {before.get(name), *whole}:
            problems.append(f"{name} {'differs' if name in {*before, *after} else 'belongs to no result'}")
    return problems


def _unreadable(name: str, file: Path) -> list[str]:
    """A checkpoint, adapter, picture or file of settings that is damaged."""
    try:
        if file.name == "state.safetensors":
            read_checkpoint(file.parent, {"max_train_steps": 10**6})
        elif file.name == "latents.safetensors":
            with opened(file):
                pass
        elif file.suffix == ".safetensors":
            fusion.load(file)
        elif file.suffix == ".png":
            fusion.load_picture(file)
        elif file.suffix == ".toml":
            fusion.TrainingConfig.from_toml(file)
    except ConfigError:  # made with another number of steps, which is no damage
        return []
    except fusion.FusionError as error:
        return [f"{name}: {error}"]
    return []


def unfinished_results(folder: Path, expected: Contents, hidden: set[str]) -> list[str]:
    """How a folder differs from that of a command which nobody has killed; a training may have more checkpoints."""
    left = contents(folder)
    problems = [f"{name} is missing" for name in expected if name not in left and "checkpoint-" not in name]
    for name, value in left.items():
        if "checkpoint-" not in name and value != expected.get(name):
            problems.append(f"{name} {'differs' if name in expected else 'is left over'}")
    return problems + [f"{name} is left over" for name in sorted(hidden_files(folder) - hidden)]


def fresh(folder: Path, *parts: Path) -> Path:
    """An empty folder with copies of the parts in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in parts:
        shutil.copytree(part, folder / part.name)
    return folder
