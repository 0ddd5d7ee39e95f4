"""A library: a plain folder of adapter files. Their headers say which slices of which base they own.

Names and slices are given out, changed and given back under one lock, so that no two processes get the same. What a
slice belongs to moves in one direction, from the reservation of a training to its unfinished adapter to the library's
file, and is counted in that order: no slice is missed on the way.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from fusion.adapters import LAYER_TYPES
from fusion.adapters.adapter import Adapter, BaseInfo
from fusion.config import NAME, NAME_RULE
from fusion.errors import ConfigError, FusionError, OutputError, SliceConflict, UnknownName, closest
from fusion.formats.adapter_file import AdapterFile, load, read_info, save
from fusion.formats.hub_file import hub_id
from fusion.library.locks import LOCK, library_lock
from fusion.library.reservations import (
    OwnedSlice,
    Reservation,
    add_reservation,
    delete_abandoned_reservations,
    reserved_slices,
)
from fusion.library.training_folders import TrainingFolder, all_training_folders
from fusion.output_files import create_folder, expanded
from fusion.spectral.slices import SpectralSlice, free_slice, least_shared_slice

logger = logging.getLogger(__name__)
_BESIDE = (".png", ".jpg", ".webp", ".json")  # what galleries keep beside name.safetensors


class Library:
    """A folder of adapters that hands out slices, also to trainings running side by side."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = expanded(folder)

    def adapters(self) -> list[AdapterFile]:
        """Every adapter in the folder, by name, from its header alone. Other files are left out with a warning."""
        entries: list[AdapterFile] = []
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                entries.append(_header(path, path.stat().st_mtime_ns))
            except (FusionError, OSError) as error:  # OSError: deleted meanwhile
                logger.warning("Not part of the library: %s", error)
        return entries

    def find(self, name: str) -> Path:
        """The file of an adapter. Raises UnknownName."""
        path = self.folder / f"{name}.safetensors"
        if not re.fullmatch(NAME, name) or not os.path.isfile(path):  # noqa: PTH113 (too long a name is none)
            near = closest(name, [entry.path.stem for entry in self.adapters()])
            raise UnknownName(f"'{self.folder}' has no adapter '{name}'{near}")
        return path

    def save(self, adapter: Adapter, name: str, dtype: str = "float16") -> Path:
        """Save an adapter under `name`, or, where that is taken, as name-2, name-3 …; no file is ever replaced.

        Raises ConfigError for what cannot be a name, FormatError for what cannot be written.
        """
        _check_name(name)
        create_folder(self.folder)
        with library_lock(self.folder):
            return _save_as(adapter, self._free_path(name), dtype)

    def replace(self, adapter: Adapter, name: str, dtype: str = "float16", *, overwrite: bool = False) -> Path:
        """Save an adapter as exactly `name`: over an adapter of the same tokens, over anything with `overwrite`.

        A folder that is no library yet does not become one. Raises OutputError for what is not replaced.
        """
        path = self.folder / f"{name}.safetensors"
        with library_lock(self.folder) if (self.folder / LOCK).exists() else nullcontext():
            return _save_as(adapter, path, dtype, overwrite=overwrite)

    def add(self, path: str | os.PathLike[str], name: str | None = None) -> Path:
        """Copy any adapter file into the library, another program's LoRA and an adapter on the Hub, too.

        Raises FormatError.
        """
        adapter = load(path)
        name = name or (adapter.info.name if hub_id(path) else Path(path).stem)
        return self.save(adapter, name, _stored_dtype(adapter))

    def rename(self, name: str, to: str | None = None, tokens: Mapping[str, str] | None = None) -> Path:
        """Another name, other tokens ({"<dog>": "<rex>"}), or both; the picture beside the file goes along."""
        if to is not None:
            _check_name(to)
        with library_lock(self.folder):
            path = self.find(name)
            adapter = load(path)
            target = path if to in (None, name) else self._free_path(str(to))
            renamed = adapter.renamed(tokens or {})
            # Written to its old place, then moved: there is one file of it at any time.
            _save_as(renamed, path, _stored_dtype(adapter), name=target.stem, overwrite=True)
            if target != path:
                for ending in _BESIDE:  # before the adapter: while it has its old name, all of it can be done again
                    if not target.with_suffix(ending).exists():
                        with suppress(OSError):  # most adapters have none of these beside them
                            path.with_suffix(ending).rename(target.with_suffix(ending))
                path.rename(target)
        return target

    def remove(self, name: str) -> None:
        """Delete an adapter and the picture beside it. Its slice is free again."""
        with library_lock(self.folder):
            path = self.find(name)
            for ending in (*_BESIDE, path.suffix):  # the adapter last: until then, it can be done again
                path.with_suffix(ending).unlink(missing_ok=True)

    def new_training_folder(self, name: str) -> TrainingFolder:
        """An empty folder, acquired, for a training that can be resumed after its program has ended.

        An adapter saved there owns its slice. Raises FormatError where nothing can be written.
        """
        return TrainingFolder.new(self.folder, name)

    def unfinished(self) -> list[TrainingFolder]:
        """Trainings that nobody is working at: stopped, or left behind by a program that has ended.

        Slices that programs which have ended had reserved are free again.
        """
        with suppress(OutputError):  # where nothing can be written, nothing is left behind either
            delete_abandoned_reservations(self.folder)
        return TrainingFolder.idle(self.folder)

    def slice_map(self, base: BaseInfo, slice_of: str = "spectrum") -> list[OwnedSlice]:
        """Who owns which slice of `base`: adapters first, then unfinished trainings and running ones."""
        with library_lock(self.folder):
            return self._owned(base, slice_of, replacing=None)

    def reserve(
        self,
        base: BaseInfo,
        rank: int,
        *,
        capacity: int,
        layout: str = "contiguous",
        slots: int = 8,
        slice_of: str = "spectrum",
        directions: SpectralSlice | None = None,
        replacing: str | None = None,
        gated: bool = False,
        share: bool = False,
    ) -> Reservation:
        """Reserve these `directions`, or the first free slice of `rank` among `capacity` directions.

        `slice_of`: what a slice means for the adapter's type (AdapterLayer.slice_of). Adapters of the token
        `replacing` do not count as owners: training a concept again may use its own slice.
        `gated`: it is for an adapter that acts at its own tokens only. With `share` such an adapter may have directions
        of other gated ones, too, and where no slice is free it gets the one that is shared least.
        Raises SliceConflict, naming the owner, if `directions` are taken, or if nothing is free.
        """
        create_folder(self.folder)
        with library_lock(self.folder):
            owned = self._owned(base, slice_of, replacing)
            others = [entry for entry in owned if not (gated and share and entry.gated)]
            limits = {"capacity": capacity, "layout": layout, "slots": slots}
            if directions is None:
                directions = _next_slice(owned, others, rank, limits)
            for entry in others:
                if entry.slice.overlap(directions):
                    raise SliceConflict(
                        f"Slice {directions} of {base.name} is taken in '{self.folder}': {entry.owner} owns directions "
                        f"{entry.slice}. Leave the slice out to get the next free one, or name another."
                    )
            sharers = tuple(entry.owner for entry in owned if entry.slice.overlap(directions))
            return add_reservation(self.folder, base, slice_of, directions, gated=gated, sharers=sharers)

    def _owned(self, base: BaseInfo, slice_of: str, replacing: str | None) -> list[OwnedSlice]:
        reserved = reserved_slices(self.folder, base, slice_of)  # first: a training saves its adapter, then releases
        unfinished = [entry for folder in all_training_folders(self.folder) for entry in Library(folder).adapters()]
        saved = self.adapters()
        owned: list[OwnedSlice] = []
        for entries, state in ((saved, ""), (unfinished, ", unfinished")):
            for entry in entries:
                owned += [
                    OwnedSlice(f"'{entry.info.name}' ({' '.join(tokens)}){state}", directions, gated)
                    for tokens, directions, gated in _slices_of(entry, base, slice_of)
                    if tokens != (replacing,)
                ]
        return owned + reserved

    def _free_path(self, name: str) -> Path:
        names = (name if number == 1 else f"{name}-{number}" for number in count(1))
        return next(path for path in (self.folder / f"{each}.safetensors" for each in names) if not path.exists())


@lru_cache(maxsize=1024)
def _header(path: Path, changed: int) -> AdapterFile:
    """Read once, until the file changes."""
    return read_info(path)


def _next_slice(
    owned: Sequence[OwnedSlice], exclusive: Sequence[OwnedSlice], rank: int, limits: Mapping[str, Any]
) -> SpectralSlice:
    """The first free slice; where there is none, the one that is shared least, if others than `exclusive` own some."""
    taken = [entry.slice for entry in owned]
    try:
        return free_slice(taken, rank, **limits)
    except SliceConflict:
        shared = least_shared_slice(taken, [entry.slice for entry in exclusive], rank, **limits)
        if shared is None:
            raise
        return shared


def _slices_of(entry: AdapterFile, base: BaseInfo, slice_of: str) -> list[tuple[tuple[str, ...], SpectralSlice, bool]]:
    """The slices of this kind of `base` that an adapter owns: the tokens each was trained for, and if they gate it."""
    of = entry.info.base
    if of is None or not of.is_same(base):
        return []
    concepts = tuple(concept.token for concept in entry.info.concepts)
    branches = [branch for branch in entry.branches if LAYER_TYPES[branch.type].slice_of == slice_of]
    return [(b.gate or concepts, directions, bool(b.gate)) for b in branches for directions in b.slices]


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"'{name[:210]}' cannot name an adapter; use {NAME_RULE}.")


def _save_as(adapter: Adapter, path: Path, dtype: str, *, name: str | None = None, overwrite: bool = False) -> Path:
    """An adapter in a library is called what its file is called."""
    info = replace(adapter.info, name=name or path.stem)
    save(replace(adapter, info=info), path, dtype=dtype, overwrite=overwrite)
    return path


def _stored_dtype(adapter: Adapter) -> str:
    """The precision of the file it was loaded from."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in adapter.parameters()}
    return "float32" if len(dtypes) != 1 else dtypes.pop()
