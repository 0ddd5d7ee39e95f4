"""Where a training keeps what it needs until it is done: a hidden folder of the library, `.unfinished/<name>`.

Whoever works there holds a lock, so that what a closed program has left behind is told from what is under way. An
adapter in the folder, what has been learned so far, owns its slice like any other of the library.
"""

import secrets
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

UNFINISHED = ".unfinished"
_LOCK = ".lock"


class TrainingFolder:
    """One such folder. Nobody's until `take`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Not bound to a thread: one begins a training, another one ends it.
        self._lock = FileLock(folder / _LOCK, thread_local=False)

    def take(self) -> bool:
        """Work here, until `leave` or `remove`. False where somebody does already."""
        try:
            self._lock.acquire(timeout=0)
        except (Timeout, OSError):  # OSError: removed this very moment
            return False
        return True

    def leave(self) -> None:
        """Keep everything, for whoever takes it up again."""
        self._lock.release()

    def remove(self) -> None:
        """Delete everything; the slice is free again, unless an adapter in the library has it."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def new_workplace(library: Path, name: str) -> TrainingFolder:
    """An empty one, taken."""
    folder = library / UNFINISHED / f"{name}-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    made = TrainingFolder(folder)
    made.take()
    return made


def left_workplaces(library: Path) -> list[TrainingFolder]:
    """Those nobody works in, by name."""
    found = [TrainingFolder(folder) for folder in workplaces(library)]
    left = [place for place in found if place.take()]
    for place in left:
        place.leave()
    return left


def workplaces(library: Path) -> list[Path]:
    return sorted(folder for folder in library.glob(f"{UNFINISHED}/*") if folder.is_dir())
