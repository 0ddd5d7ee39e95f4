"""Slices reserved by trainings that are running, each by a locked file.

It is called `.<random>.<kind>.<slice>.<process>[.gated].reserved`: which slice of what kind, and whether gated concepts
may share it. The lock says that the process lives.
"""

import hashlib
import os
import secrets
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from fusion.adapters.adapter import BaseInfo
from fusion.library.locks import library_lock, try_lock
from fusion.spectral.slices import SpectralSlice


class OwnedSlice(NamedTuple):
    """A slice and its owner in words: an adapter file by name and tokens, or a running training."""

    owner: str
    slice: SpectralSlice
    gated: bool  # its adapter acts at its own tokens only, so that other gated ones may share it


@dataclass
class Reservation(AbstractContextManager["Reservation"]):
    """A slice reserved for as long as a training runs. `release()` ends it; so does leaving a `with` block."""

    slice: SpectralSlice
    _lock: FileLock
    sharers: tuple[str, ...] = ()  # owners that have some of its directions, too

    def release(self) -> None:
        """End the reservation; an adapter saved in the library before keeps the slice. Twice does nothing."""
        if self._lock.is_locked:
            with library_lock(Path(self._lock.lock_file).parent):
                _delete(self._lock)

    def __exit__(self, *_: object) -> None:
        self.release()


def add_reservation(
    folder: Path, base: BaseInfo, slice_of: str, directions: SpectralSlice, *, gated: bool, sharers: tuple[str, ...]
) -> Reservation:
    """Reserve a slice. The caller holds the library's lock, and has checked who owns it."""
    numbers, mark = "-".join(map(str, directions.to_json())), ".gated" * gated
    name = f".{secrets.token_hex(4)}.{_kind(base, slice_of)}.{numbers}.{os.getpid()}{mark}.reserved"
    lock = try_lock(folder / name)
    assert lock is not None  # nobody else has a file of this name
    return Reservation(directions, lock, sharers)


def reserved_slices(folder: Path, base: BaseInfo, slice_of: str) -> list[OwnedSlice]:
    """Slices of running trainings; the caller holds the library's lock. Files of processes that died are deleted."""
    owned: list[OwnedSlice] = []
    for path in _held(folder, _kind(base, slice_of)):
        numbers, process = path.name.split(".")[3:5]
        directions = SpectralSlice.from_json([int(number) for number in numbers.split("-")])
        gated = path.stem.endswith(".gated")
        owned.append(OwnedSlice(f"a training under way (process {process})", directions, gated))
    return owned


def delete_abandoned_reservations(folder: Path) -> None:
    """Delete the files of processes that died, of all kinds. Raises OutputError where nothing can be written."""
    if any(folder.glob(".*.reserved")):
        with library_lock(folder):
            _held(folder)


def _held(folder: Path, kind: str = "*") -> list[Path]:
    """The files that a living process has locked; the others are deleted."""
    held: list[Path] = []
    for path in sorted(folder.glob(f".*.{kind}.*.reserved")):
        if lock := try_lock(path):
            _delete(lock)
        else:
            held.append(path)
    return held


def _kind(base: BaseInfo, slice_of: str) -> str:
    """The base and the kind of slices, as letters that any file name may have."""
    return hashlib.sha256(f"{base.family}\n{base.digest or base.name}\n{slice_of}".encode()).hexdigest()[:16]


def _delete(lock: FileLock) -> None:
    lock.release()
    with suppress(OSError):  # on Windows another program may have it open; the next count deletes it
        Path(lock.lock_file).unlink()
