"""What must hold in a folder after a command was killed, and after the next one."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

RUN = re.compile(r"[0-9a-f]{8}")  # the id of a training, another one each time
LOCKS = (".library.lock", ".lock")

Contents = dict[str, str]  # path in the folder, ids of trainings as *, -> SHA-256 of what counts


def contents(folder: Path) -> Contents:
    """Every file under its final name. Hidden files, and files in hidden folders but `.unfinished`, are left out."""
    return {path: digest(folder / file) for path, file in _files(folder) if not _hidden(path)}


def hidden_files(folder: Path) -> set[str]:
    """What lies beside the results, locks left out: parts of files, reservations, folders for later."""
    return {path for path, file in _files(folder) if _hidden(path) and Path(file).name not in LOCKS}


def _hidden(path: str) -> bool:
    return any(part.startswith(".") and part != ".unfinished" for part in Path(path).parts)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() or not file.is_dir():
            path = file.relative_to(folder)
            yield "/".join("*" if RUN.fullmatch(part) else part for part in path.parts), str(path)


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


def half_results(folder: Path, before: Contents, after: Contents) -> list[str]:
    """Files that are neither as before the command nor as after it. Checkpoints are checked by themselves."""
    problems = []
    for name, value in contents(folder).items():
        if "/checkpoint-" in name:
            problems += _checkpoint_problems(folder, name)
        elif value not in (before.get(name), after.get(name)):
            known = "differs" if name in after or name in before else "belongs to no result"
            problems.append(f"{name} {known}")
    return problems


def _checkpoint_problems(folder: Path, name: str) -> list[str]:
    from fusion.errors import FusionError
    from fusion.training.checkpoint import read_checkpoint

    problems = []
    for path in folder.glob(name):
        try:
            read_checkpoint(path.parent, {"max_train_steps": 10**6})
        except FusionError as error:
            problems += [] if "was made with" in str(error) else [f"{name}: {error}"]
    return problems


def unfinished_results(folder: Path, expected: Contents, hidden: set[str]) -> list[str]:
    """How a folder differs from that of a command which nobody has killed; a training may have more checkpoints."""
    left = contents(folder)
    problems = [f"{name} is missing" for name in expected if name not in left and "/checkpoint-" not in name]
    for name, value in left.items():
        if "/checkpoint-" not in name and value != expected.get(name):
            problems.append(f"{name} {'differs' if name in expected else 'is left over'}")
    return problems + [f"{name} is left over" for name in sorted(hidden_files(folder) - hidden)]


def fresh(folder: Path, *parts: Path) -> Path:
    """An empty folder with copies of the parts in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in parts:
        shutil.copytree(part, folder / part.name)
    return folder
