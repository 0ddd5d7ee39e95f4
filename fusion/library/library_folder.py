"""A library: a plain folder of adapter files. Which slices of which base are taken, its headers tell.

A training holds a lock on `.<random>.<whose>.<slice>.<process>.reserved` while it runs: the name says which slice it
has, and the lock that its process lives, on any platform and after any crash.
"""

import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, BaseInfo
from fusion.errors import ConfigError, FormatError, FusionError, SliceConflict, UnknownName, closest
from fusion.formats.adapter_file import AdapterFile, load, read_info, save
from fusion.library.training_folders import TrainingFolder, left_workplaces, new_workplace, workplaces
from fusion.spectral.slices import SpectralSlice, free_slice

logger = logging.getLogger(__name__)
_NAME = re.compile(r"[\w+][\w+. -]{0,99}")  # of an adapter's file: no folder, not hidden, no surprise in a shell
_BESIDE = (".png", ".jpg", ".webp", ".json")  # what galleries keep beside name.safetensors


class SliceOwner(NamedTuple):
    """Who owns a slice, in words: an adapter file by name and tokens, or a training under way."""

    who: str
    slice: SpectralSlice


@dataclass
class Reservation(AbstractContextManager["Reservation"]):
    """A slice held for as long as a training runs. `release()` gives it back; so does leaving a `with` block."""

    slice: SpectralSlice
    _lock: FileLock

    def release(self) -> None:
        """Give the slice back; once the adapter is saved in the library, its file holds it. Twice does nothing."""
        self._lock.release()
        _remove(self._lock)

    def __exit__(self, *_: object) -> None:
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
                found.append(_header(path, path.stat().st_mtime_ns))
            except (FusionError, OSError) as error:  # OSError: deleted this very moment
                logger.warning("Not part of the library: %s", error)
        return found

    def find(self, name: str) -> Path:
        """The file of an adapter. Raises UnknownName."""
        path = self.folder / f"{name}.safetensors"
        if not _NAME.fullmatch(name) or not path.is_file():
            near = closest(name, [entry.path.stem for entry in self.adapters()])
            raise UnknownName(f"'{self.folder}' has no adapter '{name}'{near}")
        return path

    def place(self, name: str) -> Path:
        """A path that is still free: name, else name-2, name-3 … Raises ConfigError for what cannot be a name."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"'{name}' cannot name an adapter; use letters, digits, spaces and + - _ .")
        endings = ("", *(f"-{i}" for i in range(2, 1000)))
        return next(p for p in (self.folder / f"{name}{end}.safetensors" for end in endings) if not p.exists())

    def add(self, path: str | os.PathLike[str], name: str | None = None) -> Path:
        """Take a copy of any adapter file into the library, another program's LoRA too. Raises FormatError."""
        adapter = load(path)
        target = self.place(name or Path(path).stem)
        save(replace(adapter, info=replace(adapter.info, name=target.stem)), target, dtype=_stored_as(adapter))
        return target

    def rename(self, name: str, to: str | None = None, tokens: Mapping[str, str] | None = None) -> Path:
        """Another name, other tokens ({"<dog>": "<rex>"}), or both; the picture beside the file goes along."""
        path = self.find(name)
        adapter = load(path)
        target = path if to in (None, name) else self.place(str(to))
        renamed = adapter.renamed(tokens or {})
        save(replace(renamed, info=replace(renamed.info, name=target.stem)), target, dtype=_stored_as(adapter))
        if target != path:
            for ending in _BESIDE:
                with suppress(OSError):
                    path.with_suffix(ending).rename(target.with_suffix(ending))
            path.unlink()
        return target

    def remove(self, name: str) -> None:
        """Delete an adapter with what is kept beside it. Its slice is free again."""
        path = self.find(name)
        for ending in (path.suffix, *_BESIDE):
            path.with_suffix(ending).unlink(missing_ok=True)

    def workplace(self, name: str) -> TrainingFolder:
        """A folder for a training that can be taken up again after its program has ended; taken, and empty.

        What is saved there as an adapter owns its slice. Raises FormatError where nothing can be written.
        """
        try:
            return new_workplace(self.folder, name)
        except OSError as error:
            raise FormatError(f"'{self.folder}' cannot be a library folder: {error.strerror}.") from error

    def unfinished(self) -> list[TrainingFolder]:
        """Trainings that nobody is working at: stopped, or left behind by a program that has ended."""
        return left_workplaces(self.folder)

    def slice_map(self, base: BaseInfo, slice_of: str = "spectrum") -> list[SliceOwner]:
        """Who owns which slice of `base`: adapters first, then unfinished trainings and those under way."""
        if not self.folder.is_dir():
            return []
        with FileLock(self.folder / ".library.lock"):
            return self._owners(base, slice_of, replacing=None)

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
            owners = self._owners(base, slice_of, replacing)
            taken = [owner.slice for owner in owners]
            part = wanted or free_slice(taken, rank, capacity=capacity, layout=layout, slots=slots)
            for owner in owners:
                if owner.slice.overlap(part):
                    raise SliceConflict(
                        f"Slice {part} of {base.name} is taken in '{self.folder}': {owner.who} owns directions "
                        f"{owner.slice}. Leave the slice out to get the next free one, or name another."
                    )
            numbers = "-".join(map(str, part.to_json()))
            note = f".{secrets.token_hex(4)}.{_digest(base, slice_of)}.{numbers}.{os.getpid()}.reserved"
            # Not bound to a thread: whoever closes the training gives the slice back.
            lock = FileLock(self.folder / note, thread_local=False)
            lock.acquire()
            return Reservation(part, lock)

    def _owners(self, base: BaseInfo, slice_of: str, replacing: str | None) -> list[SliceOwner]:
        return [*self._stored(base, slice_of, replacing), *self._reserved(_digest(base, slice_of))]

    def _stored(self, base: BaseInfo, slice_of: str, replacing: str | None) -> Iterator[SliceOwner]:
        unfinished = [entry for folder in workplaces(self.folder) for entry in Library(folder).adapters()]
        for entry in [*self.adapters(), *unfinished]:
            own = entry.info.base
            if own is None or (own.family, own.name) != (base.family, base.name):
                continue
            for branch in entry.branches:
                tokens = branch.gate or tuple(concept.token for concept in entry.info.concepts)
                if ADAPTERS[branch.type].slice_of == slice_of and tokens != (replacing,):
                    for part in branch.slices:
                        state = ", unfinished" if entry in unfinished else ""
                        yield SliceOwner(f"'{entry.info.name}' ({' '.join(tokens)}){state}", part)

    def _reserved(self, whose: str) -> Iterator[SliceOwner]:
        """Slices of trainings that still run; the notes of those that ended without a word are removed."""
        for note in sorted(self.folder.glob(f".*.{whose}.*.reserved")):
            lock = FileLock(note)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                numbers, process = note.name.split(".")[3:5]
                part = SpectralSlice.from_json([int(number) for number in numbers.split("-")])
                yield SliceOwner(f"a training under way (process {process})", part)
            else:
                lock.release()
                _remove(lock)


@lru_cache(maxsize=1024)
def _header(path: Path, changed: int) -> AdapterFile:
    """Read once for as long as the file stays as it is."""
    return read_info(path)


def _stored_as(adapter: Adapter) -> str:
    """The precision its file has, to keep."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in adapter.parameters()}
    return "float32" if len(kinds) != 1 else kinds.pop()


def _digest(base: BaseInfo, slice_of: str) -> str:
    """What the slices of a reservation mean, as letters that any file name may have."""
    return hashlib.sha256(f"{base.family}\n{base.name}\n{slice_of}".encode()).hexdigest()[:16]


def _remove(lock: FileLock) -> None:
    with suppress(OSError):  # gone already, or, on Windows, another process looks at it
        Path(lock.lock_file).unlink()
