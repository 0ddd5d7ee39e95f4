"""The files of a dataset folder, sorted by kind, and the captions in them: texts and metadata.jsonl."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from fusion.config import SURROGATE
from fusion.errors import DatasetError
from fusion.formats.picture_file import SUFFIXES

METADATA = "metadata.jsonl"
MASKS = "masks"
MAX_QUOTE = 200  # letters of a caption or name in a message
_CAPTION_KEYS = ("text", "caption", "prompt")  # in metadata.jsonl, the first that is there
_FORM = 'it needs the form {"file_name": "dog.png", "text": "a {token} asleep"}.'
_MASK_ENDINGS = ("-masklabel", ".mask")
# Files that may be in a dataset folder without being part of it.
_KNOWN = {METADATA, "concept.toml", "readme.md", "license", "license.txt", "notice", "thumbs.db", "desktop.ini"}

Files = defaultdict[str, list[Path]]  # by stem: picture, caption and mask of one stem belong together


def sort_files(folder: Path, caption_extension: str = ".txt") -> tuple[Files, Files, Files, list[Path]]:
    """A folder's pictures, captions, masks, and files that belong to no picture. Hidden files are none."""
    extension = f".{caption_extension.removeprefix('.')}".lower()
    pictures, captions, masks, others = Files(list), Files(list), Files(list), list[Path]()
    for path in visible(folder):
        stem = _stem(path)
        if path.is_dir() or path.name.lower() in _KNOWN:
            continue
        if is_picture(path):
            pictures[stem].append(path)
        elif path.suffix.lower() in SUFFIXES:
            masks[stem.removesuffix(_MASK_ENDINGS[0]).removesuffix(_MASK_ENDINGS[1])].append(path)
        elif path.name.lower().endswith(extension):
            captions[_stem(path.with_name(path.name[: -len(extension)] + ".txt"))].append(path)
        else:
            others.append(path)
    for path in visible(folder / MASKS) if (folder / MASKS).is_dir() else []:
        masks[_stem(path)].append(path)
    for files in (captions, masks):
        others += [path for stem, paths in files.items() if stem not in pictures for path in paths]
    return pictures, captions, masks, others


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture to learn from: no mask, and not hidden."""
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


def read_text(file: Path, name: str) -> str:
    """A text file in UTF-8. Raises DatasetError calling it `name`."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise DatasetError(f"{name} is no file.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None


def read_metadata(folder: Path, problems: list[str], unused: list[str]) -> dict[Path, str | None]:
    """Pictures and their captions from the folder's metadata.jsonl, if there is one.

    Each line is {"file_name": "dog.png", "text": "a {token} asleep"}, the text optional: the ImageFolder form of
    Hugging Face datasets. Without a text, "caption" or "prompt" is the caption; what else a line without a caption
    holds is appended to `unused`. What is wrong is appended to `problems`, with its line.
    """
    file, texts = folder / METADATA, dict[Path, str | None]()
    # Not splitlines: JSON strings may hold other line separators of Unicode.
    for number, line in enumerate(read_text(file, METADATA).split("\n") if file.exists() else [], start=1):
        try:
            path, text = _entry(folder, line, unused) if line.strip() else (None, None)
            if path in texts:
                raise DatasetError(f"'{path.name}' stands in an earlier line already.")
        except DatasetError as error:
            problems.append(f"{METADATA}, line {number}: {error}")
        else:
            texts |= {path: text} if path else {}
    if file.exists() and not texts and not problems:
        unused.append(f"{METADATA}, which is empty")
    return texts


def _entry(folder: Path, line: str, unused: list[str]) -> tuple[Path, str | None]:
    """One line: a picture inside the folder, and its caption if it has one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"not valid JSON: {error}.") from None
    if not isinstance(entry, dict):
        raise DatasetError(_FORM)
    name, keys = entry.get("file_name"), [key for key in _CAPTION_KEYS if entry.get(key) is not None]
    if not {"text"} & {*keys} and len({str(entry[key]) for key in keys}) > 1:
        raise DatasetError(f"it has {' and '.join(map(repr, keys))}, which differ; call the caption 'text'.")
    text = entry[keys[0]] if keys else None
    if not isinstance(name, str) or not isinstance(text, str | None):
        raise DatasetError(_FORM)
    if SURROGATE.search(text or ""):
        raise DatasetError("the caption has half of a surrogate pair, which is no valid text.")
    if text is None:
        unused += [f"'{key}' in {METADATA}" for key in entry if key not in ("file_name", *_CAPTION_KEYS)]
    path = folder / name
    try:
        # A downloaded folder must not make us read files elsewhere.
        usable = _is_inside(path, folder) and ".." not in Path(name).parts and is_picture(path) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name no file can have; links that lead to themselves
        usable = False
    if not usable:
        raise DatasetError(
            f"'{name[:MAX_QUOTE]}' is no picture in this folder; put it inside, not hidden, and not as a mask."
        )
    return path, text


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in the folder; the links of the hub's cache lead from snapshots to the blobs beside them."""
    root, target = folder.resolve(), path.resolve()
    blobs = [parent.parent.parent / "blobs" for parent in (root, *root.parents) if parent.parent.name == "snapshots"]
    return any(target.is_relative_to(place) for place in (root, *blobs))
