"""A library: a plain folder of adapter files. Which slices of which base are taken, its headers tell.

A training reserves its slice while it runs: `.<id>.reserved` says which, and a lock on `.<id>.lock` says that its
process lives, on any platform and after any crash.
"""

import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from filelock import FileLock, Timeout

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import BaseInfo
from fusion.errors import FormatError, FusionError, SliceConflict
from fusion.formats import native
from fusion.formats.native import AdapterFile
from fusion.formats.safetensors_file import write_whole
from fusion.spectral.slices import SpectralSlice, free_slice

logger = logging.getLogger(__name__)


class SliceOwner(NamedTuple):
    """Who owns a slice: an adapter file by name and token, or a training under way."""

    name: str
    token: str
    slice: SpectralSlice


@dataclass
class Reservation:
    """A slice held for as long as a training runs. `release()` gives it back; so does leaving a `with` block."""

    slice: SpectralSlice
    _note: Path
    _lock: FileLock

    def release(self) -> None:
        """Give the slice back; once the adapter is saved in the library, its file holds it. Twice does nothing."""
        self._note.unlink(missing_ok=True)
        self._lock.release()
        _remove(Path(self._lock.lock_file))

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Library:
    """A folder of adapters that hands out slices, also to trainings running side by side."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def adapters(self) -> list[AdapterFile]:
        """Every adapter in the folder, by name, from its header alone. Other files are left out with a warning."""
        found: list[AdapterFile] = []
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                found.append(native.read_info(path))
            except FusionError as error:
                logger.warning("Not part of the library: %s", error)
        return found

    def slice_map(self, base: BaseInfo, slice_of: str = "spectrum") -> list[SliceOwner]:
        """Who owns which slice of `base`: adapters first, then trainings under way."""
        return [*self._stored(base, slice_of, None), *self._reserved(base, slice_of)]

    def reserve(
        self,
        base: BaseInfo,
        rank: int,
        *,
        capacity: int,
        layout: str = "contiguous",
        slots: int = 8,
        slice_of: str = "spectrum",
        wanted: SpectralSlice | None = None,
        replacing: str | None = None,
    ) -> Reservation:
        """Reserve the slice `wanted`, or the first free one of `rank` among `capacity` directions.

        `slice_of`: what a slice means for the adapter's type (AdapterLayer.slice_of). Adapters of the token
        `replacing` do not count as owners: training a concept again may take its own slice.
        Raises SliceConflict, naming the owner, if `wanted` is taken, or if nothing is free.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(f"'{self.folder}' cannot be a library folder: {error.strerror}.") from error
        with FileLock(self.folder / ".library.lock"):
            owners = [*self._stored(base, slice_of, replacing), *self._reserved(base, slice_of)]
            taken = [owner.slice for owner in owners]
            if wanted is None:
                wanted = free_slice(taken, rank, capacity=capacity, layout=layout, slots=slots)
            elif owner := next((owner for owner in owners if owner.slice.overlap(wanted)), None):
                raise SliceConflict(self._taken(base, wanted, owner))
            return self._hold(base, slice_of, wanted)

    def _taken(self, base: BaseInfo, wanted: SpectralSlice, owner: SliceOwner) -> str:
        who = f"'{owner.name}' ({owner.token})" if owner.token else owner.name
        return (
            f"Slice {wanted} of {base.name} is taken in '{self.folder}': {who} owns directions {owner.slice}. "
            "Leave the slice out to get the next free one, or name another."
        )

    def _stored(self, base: BaseInfo, slice_of: str, replacing: str | None) -> Iterator[SliceOwner]:
        for entry in self.adapters():
            if entry.base is None or (entry.base.family, entry.base.name) != (base.family, base.name):
                continue
            own = [concept.token for concept in entry.info.concepts]
            for branch in entry.branches:
                tokens = branch.gate or tuple(own)
                if ADAPTERS[branch.type].slice_of == slice_of and tokens != (replacing,):
                    for part in branch.slices:
                        yield SliceOwner(entry.info.name, " ".join(tokens), part)

    def _reserved(self, base: BaseInfo, slice_of: str) -> Iterator[SliceOwner]:
        """Slices of trainings that still run; notes of those that ended without a word are removed."""
        for note in sorted(self.folder.glob(".*.reserved")):
            lock = FileLock(note.with_suffix(".lock"))
            with suppress(Timeout):
                lock.acquire(timeout=0)
                note.unlink(missing_ok=True)
                lock.release()
                _remove(Path(lock.lock_file))
                continue
            try:
                said = json.loads(note.read_text(encoding="utf-8"))
                whose, part = said["of"], SpectralSlice.from_json(said["slice"])
                running = f"a training under way (process {said['process']} on {said['host']})"
            except FileNotFoundError:  # released just now
                continue
            except (OSError, ValueError, TypeError, LookupError) as error:
                raise FormatError(f"The reservation '{note}' cannot be read; delete it if no training runs.") from error
            if whose == [base.family, base.name, slice_of]:
                yield SliceOwner(running, "", part)

    def _hold(self, base: BaseInfo, slice_of: str, part: SpectralSlice) -> Reservation:
        note = self.folder / f".{secrets.token_hex(4)}.reserved"
        # Not bound to a thread: whoever closes the training gives the slice back.
        lock = FileLock(note.with_suffix(".lock"), thread_local=False)
        lock.acquire()
        said = {
            "slice": part.to_json(),
            "of": [base.family, base.name, slice_of],
            "process": os.getpid(),
            "host": socket.gethostname(),
        }
        write_whole(note, [json.dumps(said).encode()])
        return Reservation(part, note, lock)


def _remove(lock: Path) -> None:
    with suppress(OSError):  # Windows: another process looks at it
        lock.unlink()
