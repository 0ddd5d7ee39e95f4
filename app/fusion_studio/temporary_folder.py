"""The studio's temporary folder: only its user can read it, and it is gone when the studio is.

A running studio holds a lock on its folder, which the system releases however the process ends. So the next studio
recognises what a killed one has left, and leaves that of a running one alone; so does systemd-tmpfiles.
Where the system has no such locks (Windows), a killed studio's folder stays.
"""

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PREFIX = "fusion-studio-"


class TemporaryFolder:
    """A new folder in the system's temporary folder, mode 0700, until `remove` or the end of the process."""

    def __init__(self) -> None:
        remove_abandoned()
        self._lock: int | None = None
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
            if fcntl is None:
                break
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.path.is_dir():  # else another studio, just starting, took it for abandoned before it was locked
                break
            os.close(self._lock)
        atexit.register(self.remove)

    def remove(self) -> None:
        """Delete the folder with everything in it. A second call does nothing."""
        atexit.unregister(self.remove)
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned() -> None:
    """Delete the folders of studios that were killed."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # deleted meanwhile, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.getuid() and stat.S_IMODE(os.fstat(lock).st_mode) == 0o700:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its studio is running
            pass
        finally:
            os.close(lock)
