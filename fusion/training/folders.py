"""What lies in a dataset folder, sorted by what it is."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from fusion.errors import DatasetError
from fusion.training.pictures import SUFFIXES

METADATA = "metadata.jsonl"
MASKS = "masks"
_MASK_ENDINGS = ("-masklabel", ".mask")
# Files that may lie in a dataset folder without being part of it.
_KNOWN = {METADATA, "concept.toml", "readme.md", "license", "license.txt", "notice", "thumbs.db", "desktop.ini"}

Files = defaultdict[str, list[Path]]  # by stem: picture, caption and mask of one stem belong together


def sort_files(folder: Path) -> tuple[Files, Files, Files, list[Path]]:
    """A folder's pictures, captions, masks, and files that belong to no picture. Hidden files are none."""
    pictures, captions, masks, others = Files(list), Files(list), Files(list), list[Path]()
    for path in visible(folder):
        stem = _stem(path)
        if path.is_dir() or path.name.lower() in _KNOWN:
            continue
        if is_picture(path):
            pictures[stem].append(path)
        elif path.suffix.lower() in SUFFIXES:
            masks[stem.removesuffix(_MASK_ENDINGS[0]).removesuffix(_MASK_ENDINGS[1])].append(path)
        elif path.suffix.lower() == ".txt":
            captions[stem].append(path)
        else:
            others.append(path)
    for path in visible(folder / MASKS) if (folder / MASKS).is_dir() else []:
        masks[_stem(path)].append(path)
    for files in (captions, masks):
        others += [path for stem, paths in files.items() if stem not in pictures for path in paths]
    return pictures, captions, masks, others


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture to learn from, no mask and not hidden."""
    mask = path.stem.endswith(_MASK_ENDINGS) or path.parent.name == MASKS
    return path.suffix.lower() in SUFFIXES and not mask and not path.name.startswith(".")


def visible(folder: Path) -> list[Path]:
    """Files and folders that are not hidden, by name."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"'{folder}' cannot be read: {error.strerror}.") from None


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of many names."""
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def _stem(path: Path) -> str:
    """The name without its ending; composed and decomposed accents are one, as macOS mixes them."""
    return unicodedata.normalize("NFC", path.stem)
