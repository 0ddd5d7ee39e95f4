"""The models and examples that travel with the toolkit, in a checkout and in an installed wheel alike. No torch."""

from importlib.resources import files
from pathlib import Path

from fusion.errors import BaseMismatch


def pocket() -> Path:
    """The folder of the embedded base."""
    return embedded("pocket", "model_index.json")


def embedded(name: str, index: str) -> Path:
    """The folder of what travels with the toolkit, known by its file `index`. Raises BaseMismatch."""
    package = Path(str(files("fusion")))
    for folder in (package / "_assets" / name, package.parent / "assets" / name):
        if (folder / index).is_file():
            return folder
    raise BaseMismatch(f"'{name}' is missing from this installation of spectral-fusion; install it again.")
