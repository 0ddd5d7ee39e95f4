"""Trainings that ended before their last step, and what it takes to go on with them exactly.

A training that may be interrupted works in a folder of its library (Library.new_training_folder). There are its
settings, its pictures, its checkpoints, and the adapter as it was at the latest of them, which owns the slice until
then.
"""

from dataclasses import dataclass
from pathlib import Path

from fusion.errors import FusionError
from fusion.formats.adapter_file import AdapterFile
from fusion.library.library_folder import Library
from fusion.library.training_folders import TrainingFolder
from fusion.training.config import TrainingConfig

SETTINGS = "training.toml"


@dataclass(frozen=True)
class Unfinished:
    """A training nobody is working at. `str` tells people which one and how far it came."""

    place: TrainingFolder
    config: TrainingConfig | None  # None: its settings cannot be read; it can only be removed
    sofar: AdapterFile | None  # as it was at the latest checkpoint

    @property
    def done(self) -> int:
        return self.sofar.info.provenance.steps if self.sofar else 0

    def __str__(self) -> str:
        if self.config is None:
            return f"{self.place.folder.name}: cannot be read"
        return f"{self.config.token}: {self.done} of {self.config.max_train_steps} steps"

    def take(self) -> TrainingConfig | None:
        """Work at it: settings that go on from the latest checkpoint. Raises FusionError where somebody does."""
        if not self.place.acquire():
            raise FusionError("Somebody is at work on this training already.")
        return self.config.updated({"resume_from_checkpoint": "latest"}) if self.config and self.sofar else self.config


def keep_settings(place: TrainingFolder, config: TrainingConfig) -> Path:
    """Into the training's folder, in the form `fusion train --config` reads."""
    file = place.folder / SETTINGS
    file.write_text(config.to_toml(), encoding="utf-8")
    return file


def unfinished(library: Library) -> dict[str, Unfinished]:
    """The unfinished trainings of a library, by the names of their folders, wherever the library is now."""
    return {place.folder.name: _read(library, place) for place in library.unfinished()}


def _read(library: Library, place: TrainingFolder) -> Unfinished:
    sofar = next(iter(Library(place.folder).adapters()), None)
    try:
        config = TrainingConfig.from_toml(place.folder / SETTINGS)
    except FusionError:
        return Unfinished(place, None, sofar)
    moved = {"instance_data_dir": place.folder / config.instance_data_dir.name, "output_dir": place.folder}
    return Unfinished(place, config.updated({**moved, "library": library.folder}), sofar)
