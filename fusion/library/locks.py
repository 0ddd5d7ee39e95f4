"""The lock of a library, held while names, slices and training folders are given out, given back or counted.

Locks are files that the operating system unlocks when their process ends, on any platform and after any crash.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fusion.errors import OutputError

LOCK = ".library.lock"


@contextmanager
def library_lock(folder: Path) -> Generator[None, None, None]:
    """Wait for the library's lock and hold it. A folder that does not exist has nothing to lock.

    A thread that holds it may lock again: an abandoned training can be collected, and its slice released, at any time.
    Raises OutputError where nothing can be written.
    """
    if not folder.is_dir():
        yield
        return
    lock = FileLock(folder / LOCK, poll_interval=0.005, is_singleton=True)
    try:
        lock.acquire()
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be locked as a library: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path) -> FileLock | None:
    """The lock at `path`, acquired, or None where another holds it; any thread may release it."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock
