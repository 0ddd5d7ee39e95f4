"""Outputs: every file that this package writes goes through here, and appears whole or not at all.

A file is written under a temporary name beside its target, `.<name>.<random>.writing`, flushed to the disk and renamed.
Files that belong together are written into a temporary folder; once complete it is renamed to
`.<name>.<random>.moving`, and its entries are moved to their places. A writer locks what is temporary. What a process
that died left behind is not locked: the next writer in the folder deletes it, or moves it if it was complete.
"""

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusion.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: there, what is open cannot be deleted, and what is old enough is taken for abandoned
    fcntl = None

MARK = "spectral-fusion"  # in the metadata of pictures, plots and texts: by it they are recognised as ours
MAX_TEMPORARY = 200  # bytes of a temporary name
ABANDONED_AFTER = 3600.0  # seconds without a change, where locks are not available
_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{8}\.(writing|moving)", re.DOTALL)
_RECIPE = b"tEXtfusion\0"  # pictures drawn by versions that wrote no mark
_ENDS = 2**16  # bytes at the beginning and at the end of a file in which its mark is

PathLike = str | os.PathLike[str]


def write_output(path: PathLike, *parts: bytes | memoryview) -> Path:
    """Write a file, whole or not at all; its folder is created, a link is followed. Raises OutputError.

    Whose file is replaced was checked before, by `check_output`.
    """
    target = _resolved(path)
    with _one_line(path):
        if os.path.lexists(target) and not target.is_file():
            raise OSError(0, f"it is {_kind(target)}")
        create_folder(target.parent)
        remove_leftovers(target.parent)
        descriptor, partial = _temporary_file(target)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.writelines(parts)
                stream.flush()
                os.fsync(stream.fileno())
                if fcntl is None:  # an open file cannot be renamed there
                    stream.close()
                partial.replace(target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        _sync(target.parent)
    return Path(path)


@contextmanager
def output_group(path: PathLike) -> Generator[Path]:
    """A temporary folder; what a block writes into it appears in the folder of `path` at its end, all or nothing.

    `path` is the main entry, a file or a folder, and is moved last. Entries of the same names are replaced, folders as
    a whole. Raises OutputError.
    """
    target = _resolved(path)
    with _one_line(path):
        create_folder(target.parent)
        remove_leftovers(target.parent)
        descriptor, partial = _temporary_folder(target)
        try:
            yield partial
            for folder, _, names in os.walk(partial):
                for entry in (Path(folder), *(Path(folder, name) for name in names)):
                    _sync(entry)
            partial = partial.rename(partial.with_suffix(".moving"))
            _sync(target.parent)
            try:
                _move_entries(partial, last=target.name)
            except KeyboardInterrupt:  # what is complete is not left half moved
                _move_entries(partial, last=target.name)
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)
        _sync(target.parent)


@contextmanager
def folder_lock(folder: Path) -> Generator[None]:
    """Wait for other writers that choose free names in a folder. Does nothing where folders cannot be locked."""
    if fcntl is None:
        yield
        return
    with _one_line(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def create_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises OutputError."""
    if not folder.is_dir():
        with _one_line(folder):
            if os.path.lexists(folder) and not folder.is_dir():  # another process may just have created it
                raise OSError(0, f"it is {_kind(folder)}, not a folder")
            create_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _sync(folder.parent)


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Delete what writers that died left in a folder, or move what is complete; `below`: in its folders, too."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            path = Path(entry.path)
            if _LEFTOVER.fullmatch(entry.name):
                _remove_leftover(path)
            elif below and entry.is_dir(follow_symlinks=False) and any(path.iterdir()):
                remove_leftovers(path, below=True)
                with suppress(OSError):  # it has something else, most often
                    path.rmdir()


def carries_mark(path: Path) -> bool:
    """Whether a picture, plot or text says that this package made it."""
    with suppress(OSError), path.open("rb") as stream:
        beginning = stream.read(_ENDS)
        stream.seek(max(0, path.stat().st_size - _ENDS))
        return MARK.encode() in beginning + stream.read(_ENDS) or _RECIPE in beginning
    return False


def foreign_file(path: Path) -> str:
    """Why an existing file is not replaced: this package has not made it. Empty if it has."""
    return "" if carries_mark(path) else "it was not made by this program"


def check_output(
    path: PathLike, *, endings: tuple[str, ...] = (), folder: bool = False, size: int = 0,
    foreign: Callable[[Path], str] = foreign_file, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Raise OutputError now for an output that could not, or must not, be written later. Returns its path.

    `endings`: those that the name may have. `folder`: the output is a folder. `size`: about how many bytes it takes.
    `foreign`: why an existing one is not replaced, empty if it is one's own; with `overwrite` anything is.
    """
    target = _resolved(path)
    with _one_line(path):
        if endings and target.suffix.lower() not in endings:
            raise OSError(0, f"name a file that ends in {' or '.join(endings)}")
        if os.path.lexists(target) and not (target.is_dir() if folder else target.is_file()):
            raise OSError(0, f"it is {_kind(target)}")
        parent = next(parent for parent in target.parents if os.path.lexists(parent))
        if not parent.is_dir():
            raise OSError(0, f"'{parent}' is {_kind(parent)}, not a folder")
        _check_names(target, parent)
        remove_leftovers(parent)  # a probe among them, where the folder of the output does not exist yet
        descriptor, probe = _temporary_file(parent / "probe")
        os.close(descriptor)  # from here on another writer may take it for a leftover
        probe.unlink(missing_ok=True)
        if (free := shutil.disk_usage(parent).free) < size:
            raise OSError(0, f"about {size / 1e6:,.1f} MB are needed there, {free / 1e6:,.1f} MB are free")
        if not overwrite and os.path.lexists(target) and (reason := foreign(target)):
            raise OSError(0, f"{reason}; choose another name, or replace it with --overwrite (overwrite=True)")
    return expanded(path)


def _check_names(target: Path, parent: Path) -> None:
    """Raise OSError for names below `parent` that its file system cannot have."""
    of_system = getattr(os, "pathconf", lambda _, name: {"PC_NAME_MAX": 255, "PC_PATH_MAX": 4096}[name])
    limit = of_system(parent, "PC_NAME_MAX")
    if (longest := max(len(os.fsencode(part)) for part in target.relative_to(parent).parts)) > limit:
        raise OSError(0, f"a name of {longest} bytes is too long, at most {limit} are possible there")
    if len(os.fsencode(target)) + MAX_TEMPORARY > of_system(parent, "PC_PATH_MAX"):
        raise OSError(0, "the whole path is too long")


def expanded(path: PathLike) -> Path:
    """A path with `~` replaced by the home folder. Raises OutputError for what can be no path."""
    try:
        if "\0" in str(path):
            raise RuntimeError("a name cannot have a null character")
        return Path(path).expanduser()
    except RuntimeError as error:  # also: a user who does not exist
        raise OutputError(f"{_quoted(path)} cannot be written: {str(error).rstrip('.')}.") from None


def _resolved(path: PathLike) -> Path:
    """Absolute, `~` expanded, links followed."""
    return Path(os.path.realpath(expanded(path)))


@contextmanager
def _one_line(path: PathLike) -> Generator[None]:
    """Errors of the system as an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{_quoted(path)} cannot be written: {error.strerror or error}.") from error


def _quoted(path: PathLike) -> str:
    return "'{}'".format(str(path).replace("\0", "\\0"))


def _kind(path: Path) -> str:
    """What stands where a file or folder is wanted."""
    mode = stat.S_IFMT(path.stat().st_mode) if path.exists() else stat.S_IFLNK
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a broken link"}
    return kinds.get(mode, "a device")


def _temporary_file(target: Path) -> tuple[int, Path]:
    """A new file beside `target`, open for writing and locked."""
    while True:
        partial = _temporary_name(target)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _lock(descriptor, wait=True) is not False and partial.exists():
            return descriptor, partial
        os.close(descriptor)  # another writer took it for a leftover before it was locked


def _temporary_folder(target: Path) -> tuple[int | None, Path]:
    """A new folder beside `target`, and the descriptor that locks it."""
    while True:
        partial = _temporary_name(target)
        partial.mkdir()
        if fcntl is None:
            return None, partial
        with suppress(FileNotFoundError):  # as above
            descriptor = os.open(partial, os.O_RDONLY)
            if _lock(descriptor, wait=True) is not False and partial.exists():
                return descriptor, partial
            os.close(descriptor)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.writing")


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """Whether it was locked; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_leftover(path: Path) -> None:
    """Delete what is temporary, or move what is complete, unless its writer lives."""
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        locked = _lock(descriptor, wait=False) if descriptor is not None else None
        abandoned = time.time() - path.stat().st_mtime > ABANDONED_AFTER if locked is None else locked
        if not abandoned:
            return
        if path.suffix == ".moving":
            with suppress(OSError):
                _move_entries(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _move_entries(group: Path, last: str = "") -> None:
    """Move the entries of a complete group to the folder in which it is."""
    for entry in sorted(group.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        target = group.parent / entry.name
        if entry.is_dir() and target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        entry.replace(target)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, where the platform can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
