"""Trainings that ended before their last step, and what it takes to resume them exactly.

A training that may be interrupted works in a folder of its library (Library.new_training_folder). There are its
pictures, its settings, which are written once the pictures are there, its checkpoints, and the adapter as it was at the
latest of them, which owns the slice until then.
"""

from dataclasses import dataclass
from pathlib import Path

from fusion.errors import FusionError
from fusion.formats.adapter_file import AdapterFile
from fusion.library.library_folder import Library
from fusion.library.training_folders import TrainingFolder
from fusion.output_files import write_output
from fusion.training.config import TrainingConfig

SETTINGS_FILE = "training.toml"


@dataclass(frozen=True)
class UnfinishedTraining:
    """A training that no process is running. `str` is its token and how many steps are done."""

    folder: TrainingFolder
    config: TrainingConfig | None  # None: its settings cannot be read; it can only be deleted
    adapter: AdapterFile | None  # as it was at the latest checkpoint

    @property
    def steps(self) -> int:
        """Steps done at the latest checkpoint."""
        return self.adapter.info.provenance.steps if self.adapter else 0

    def __str__(self) -> str:
        if self.config is None:
            return f"{self.folder.folder.name}: cannot be read"
        return f"{self.config.token}: {self.steps} of {self.config.max_train_steps} steps"

    def acquire(self) -> TrainingConfig | None:
        """Lock its folder; returns the settings to resume with. Raises FusionError where it is locked."""
        if not self.folder.acquire():
            raise FusionError("This training is running already, in another program or page.")
        # A program may have ended after a checkpoint and before the adapter beside it.
        checkpoints = (self.folder.folder / "checkpoints").glob("**/checkpoint-*/*")
        resumed = {"resume_from_checkpoint": "latest"} if self.adapter or any(checkpoints) else {}
        return self.config and self.config.updated(resumed)


def save_training_settings(folder: TrainingFolder, config: TrainingConfig) -> Path:
    """Write the settings into the training's folder, in the form that `fusion train --config` reads."""
    return write_output(folder.folder / SETTINGS_FILE, config.to_toml().encode())


def find_unfinished_trainings(library: Library) -> dict[str, UnfinishedTraining]:
    """The unfinished trainings of a library by the names of their folders, also after the library was moved.

    A folder without settings and without anything learned was left by a program that ended before it had all pictures,
    and is deleted.
    """
    folders = library.unfinished()
    for folder in folders:
        learned = any(folder.folder.rglob("*.safetensors"))
        if not learned and not (folder.folder / SETTINGS_FILE).exists() and folder.acquire():
            folder.delete()
    return {folder.folder.name: _read(library, folder) for folder in folders if folder.folder.exists()}


def _read(library: Library, folder: TrainingFolder) -> UnfinishedTraining:
    adapter = next(iter(Library(folder.folder).adapters()), None)
    try:
        config = TrainingConfig.from_toml(folder.folder / SETTINGS_FILE)
    except FusionError:
        return UnfinishedTraining(folder, None, adapter)
    paths = {"instance_data_dir": folder.folder / config.instance_data_dir.name, "output_dir": folder.folder}
    return UnfinishedTraining(folder, config.updated({**paths, "library": library.folder}), adapter)
