"""Where a training keeps what it needs until it is done: a hidden folder of the library, `.unfinished/<name>`.

Whoever works there holds its lock; a folder that nobody has locked was left by a training that was stopped, or by a
program that has ended. An adapter in the folder, as it was at the latest checkpoint, owns its slice like any other of
the library.
"""

import secrets
import shutil
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from fusion.errors import FormatError
from fusion.library.locks import create_folder, library_lock

UNFINISHED = ".unfinished"
_LOCK = ".lock"


class TrainingFolder:
    """One such folder. Nobody works in it until `acquire`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._library = folder, folder.parent.parent
        # Not bound to a thread: one begins a training, another one ends it.
        self._lock = FileLock(folder / _LOCK, thread_local=False)

    @classmethod
    def new(cls, library: Path, name: str) -> Self:
        """An empty one, acquired. Raises FormatError where nothing can be written."""
        training = cls(library / UNFINISHED / f"{name}-{secrets.token_hex(4)}")
        create_folder(library)
        with library_lock(library):
            create_folder(training.folder)
            training._acquire()
        return training

    @classmethod
    def idle(cls, library: Path) -> list[Self]:
        """Those that nobody works in, by name."""
        if not (folders := all_training_folders(library)):
            return []
        try:
            with library_lock(library):
                idle = [training for training in map(cls, folders) if training._acquire()]
                for training in idle:
                    training.release()
        except FormatError:
            return []  # no training can be resumed where nothing can be written
        return idle

    def acquire(self) -> bool:
        """Work here, until `release` or `delete`. False where somebody does already, and where it was deleted."""
        # Listing probes the locks of all folders, under the same lock: it is never in the way.
        with library_lock(self._library):
            return self._acquire()

    def _acquire(self) -> bool:
        if self._lock.is_locked or not self.folder.is_dir():  # locking would create the folder again
            return False
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Keep everything, for whoever resumes the training."""
        self._lock.release()

    def delete(self) -> None:
        """Delete everything; the slice is free again, unless an adapter in the library has it."""
        with library_lock(self._library):
            self._lock.release()
            shutil.rmtree(self.folder, ignore_errors=True)


def all_training_folders(library: Path) -> list[Path]:
    return sorted(folder for folder in library.glob(f"{UNFINISHED}/*") if folder.is_dir())
