"""What lies in a dataset folder, sorted by what it is."""

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from fusion.errors import DatasetError
from fusion.training.pictures import SUFFIXES

METADATA = "metadata.jsonl"
MASKS = "masks"
_MASK_ENDINGS = ("-masklabel", ".mask")
# Files that may lie in a dataset folder without being part of it.
_KNOWN = {METADATA, "concept.toml", "readme.md", "license", "license.txt", "notice", "thumbs.db", "desktop.ini"}


@dataclass
class Contents:
    """One folder's files by stem: picture, caption and mask of one stem belong together. Hidden files are none."""

    pictures: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])
    captions: dict[str, Path] = field(default_factory=dict[str, Path])
    masks: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])
    folders: list[Path] = field(default_factory=list[Path])
    others: list[Path] = field(default_factory=list[Path])

    @classmethod
    def of(cls, folder: Path, caption_extension: str) -> "Contents":
        """Sort a folder's files. Raises DatasetError when it cannot be listed."""
        found = cls()
        for path in visible(folder):
            stem, kind = _stem(path), path.suffix.lower()
            subject = next((stem.removesuffix(ending) for ending in _MASK_ENDINGS if stem.endswith(ending)), None)
            if path.is_dir() and path.name == MASKS:
                for mask in visible(path):
                    found.masks.setdefault(_stem(mask), []).append(mask)
            elif path.is_dir():
                found.folders.append(path)
            elif path.name.lower() in _KNOWN:
                continue
            elif kind in SUFFIXES and subject is None:
                found.pictures.setdefault(stem, []).append(path)
            elif kind in SUFFIXES:
                found.masks.setdefault(str(subject), []).append(path)
            elif kind == caption_extension.lower():
                found.captions[stem] = path
            else:
                found.others.append(path)
        return found

    def strays(self) -> list[Path]:
        """Files that belong to no picture."""
        captions = [path for stem, path in self.captions.items() if stem not in self.pictures]
        masks = [path for stem, paths in self.masks.items() if stem not in self.pictures for path in paths]
        return sorted([*captions, *masks, *self.others])


def visible(folder: Path) -> list[Path]:
    """Files and folders that are not hidden, by name."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"'{folder}' cannot be read: {error.strerror}.") from None


def _stem(path: Path) -> str:
    """The name without its ending; composed and decomposed accents are one, as macOS mixes them."""
    return unicodedata.normalize("NFC", path.stem)
