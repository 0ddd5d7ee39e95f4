"""Where a training keeps what it needs until it is done: a hidden folder of the library, `.unfinished/<name>`.

The process that trains holds the folder's lock; an unlocked one was left by a training that was stopped, or by a
program that has ended. An adapter in the folder, as it was at the latest checkpoint, owns its slice like any other of
the library.
"""

import secrets
import shutil
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from fusion.errors import FormatError
from fusion.library.locks import library_lock
from fusion.output_files import create_folder, remove_leftovers

UNFINISHED = ".unfinished"
_LOCK = ".lock"


class TrainingFolder:
    """The folder of one training, unlocked until `acquire`."""

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
        """The folders that no process has locked, by name."""
        if not (folders := all_training_folders(library)):
            return []
        try:
            with library_lock(library):
                idle = [training for training in map(cls, folders) if training._acquire()]
                for training in idle:
                    remove_leftovers(training.folder, below=True)
                    training.release()
        except FormatError:
            return []  # no training can be resumed where nothing can be written
        return idle

    def acquire(self) -> bool:
        """Lock the folder until `release` or `delete`. False where it is locked already, and where it was deleted."""
        # Listing tries the locks of all folders; under the same lock, it never makes this fail.
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
        """Unlock the folder and keep everything in it, so that the training can be resumed."""
        self._lock.release()

    def delete(self) -> None:
        """Delete everything; the slice is free again, unless an adapter in the library has it."""
        with library_lock(self._library):
            self._lock.release()
            shutil.rmtree(self.folder, ignore_errors=True)


def all_training_folders(library: Path) -> list[Path]:
    return sorted(folder for folder in library.glob(f"{UNFINISHED}/*") if folder.is_dir())
