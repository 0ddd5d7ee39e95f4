"""A folder of pictures as training examples. Every file is checked here, before training starts.

    dog.png  dog.txt  masks/dog.png     a picture, its caption, its mask (or dog-masklabel.png, dog.mask.png)
    metadata.jsonl                      captions instead: {"file_name": "dog.png", "text": "a {token} asleep"}
    10_sks dog/                         pictures to repeat 10 times; "sks dog" and "sks" mean the token (kohya)

A picture without a caption takes the instance prompt. A caption that does not name the token is an error under
token gating, where it could teach nothing; without gates it is allowed, and said. Nothing is left out silently.
"""

import logging
import random
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusion.config import listing
from fusion.errors import DatasetError
from fusion.training.captions import caption_for, read_metadata, read_text
from fusion.training.config import TrainingConfig
from fusion.training.folders import METADATA, Contents, visible
from fusion.training.pictures import SUFFIXES, Cut, cut, decoded, is_transparent, load_mask, load_picture

logger = logging.getLogger(__name__)

_REPEATED = re.compile(r"([1-9]\d*)_(.+)")  # kohya's folder names


@dataclass(frozen=True)
class Example:
    """One picture with what is said about it."""

    image_path: Path
    caption: str
    mask_path: Path | None
    repeats: int
    size: tuple[int, int]  # width, height, upright


@dataclass(frozen=True)
class Dataset:
    """Checked examples, and `notes`: what the user may not expect about them."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def smaller_than(self, resolution: int) -> tuple[Example, ...]:
        """Examples that have to be enlarged."""
        return tuple(example for example in self.examples if min(example.size) < resolution)

    def order(self, batch_size: int, seed: int) -> "BatchOrder":
        return BatchOrder(tuple(example.repeats for example in self.examples), batch_size, seed)


@dataclass(frozen=True)
class BatchOrder:
    """Which examples make batch k: a function of the seed and k alone, so a resumed training continues exactly.

    Every epoch is a permutation of all examples, each as often as it is repeated; a batch may end one epoch and
    begin the next, so all batches are full.
    """

    repeats: tuple[int, ...]
    batch_size: int
    seed: int

    def batch(self, number: int) -> tuple[int, ...]:
        """Indices of the examples in batch `number`, counted from 0."""
        first, length = number * self.batch_size, sum(self.repeats)
        epochs = range(first // length, (first + self.batch_size - 1) // length + 1)
        row = [index for epoch in epochs for index in self.epoch(epoch)]
        start = first - epochs.start * length
        return tuple(row[start : start + self.batch_size])

    def epoch(self, number: int) -> list[int]:
        """All examples in the order of one epoch."""
        deck = [index for index, count in enumerate(self.repeats) for _ in range(count)]
        return random.Random(f"epoch {number} of seed {self.seed}").sample(deck, len(deck))


def prepare(example: Example, resolution: int, config: TrainingConfig, generator: torch.Generator | None = None) -> Cut:
    """The pixels of one example as the config wants them; `generator` draws crops and flips."""
    mask = load_mask(example.mask_path, example.size) if example.mask_path else None
    return cut(
        load_picture(example.image_path),
        mask,
        resolution,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        interpolation=config.image_interpolation_mode,
        generator=generator,
    )


def instance_dataset(config: TrainingConfig) -> Dataset:
    """The pictures of the concept. Raises DatasetError naming every file with a problem."""
    reader = _Reader(
        config.instance_data_dir,
        prompt=config.worded(config.instance_prompt),
        token=config.token,
        caption_extension=config.caption_extension,
        use_masks=config.use_masks,
        token_needed=config.gating == "tokens",
    )
    examples = reader.examples(config.repeats)
    if not examples and not reader.problems:
        kinds = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
        reader.problems.append(f"there are no pictures in it; put some there ({kinds})")
    return reader.finished(examples)


def class_dataset(config: TrainingConfig) -> Dataset:
    """The class pictures there are, all with the class prompt; none at all is no error, as they can be drawn."""
    folder = config.class_folder()
    if not config.class_prompt or not folder.exists():
        return Dataset(())
    reader = _Reader(folder, config.class_prompt)
    return reader.finished(reader.examples(1))


@dataclass
class _Reader:
    """Reads one dataset folder, collecting problems and what to tell over all files."""

    folder: Path
    prompt: str  # of pictures without a caption
    token: str | None = None  # None: captions are not read
    caption_extension: str = ""
    use_masks: bool = False
    token_needed: bool = False
    problems: list[str] = field(default_factory=list[str])
    unused: list[str] = field(default_factory=list[str])
    captionless: list[str] = field(default_factory=list[str])
    tokenless: list[str] = field(default_factory=list[str])
    transparent: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise DatasetError(f"'{self.folder}' is no folder; name the one that holds the pictures.")
        self.texts = read_metadata(self.folder, self.problems) if self.token else {}

    def examples(self, repeats: int) -> list[Example]:
        """The examples of the folder, of its repeated sub-folders and of those that metadata names."""
        times = {self.folder: 1} | {path.parent: 1 for path in self.texts}
        folders = [path for path in visible(self.folder) if path.is_dir()]
        times |= {path: int(match[1]) for path in folders if (match := _REPEATED.fullmatch(path.name))}
        examples: list[Example] = []
        lost = set(self.texts)
        for path, count in sorted(times.items()):
            contents = Contents.of(path, self.caption_extension)
            lost -= {picture for pictures in contents.pictures.values() for picture in pictures}
            deeper = {parent for other in times for parent in (other, *other.parents)}
            self.unused += [f"{self._name(folder)}/" for folder in contents.folders if folder not in deeper]
            if path != self.folder and (path / METADATA).exists():
                self.unused.append(self._name(path / METADATA))
            named = _REPEATED.fullmatch(path.name) if path != self.folder else None
            examples += self._examples_of(contents, repeats * count, named[2].strip() if named else "")
        self.problems += [f"{METADATA} names {self._name(path)}, which is a mask or hidden." for path in sorted(lost)]
        return examples

    def finished(self, examples: list[Example]) -> Dataset:
        """The dataset, its notes said as warnings; or one DatasetError with all problems."""
        if self.problems:
            raise DatasetError(f"'{self.folder.name}': {listing(self.problems)}")
        maskless = [self._name(example.image_path) for example in examples if not example.mask_path]
        tell = {
            f"Without a caption, so '{self.prompt}' is used": _if_mixed(self.captionless, examples),
            f"Captions that do not name {self.token}": self.tokenless,
            "Without a mask, so learned whole": _if_mixed(maskless, examples),
            "With transparent parts, which are filled with white": self.transparent,
            "Not used": self.unused,
        }
        notes = tuple(f"{what}: {_some(names)}." for what, names in tell.items() if names)
        for note in notes:
            logger.warning("'%s': %s", self.folder.name, note)
        return Dataset(tuple(examples), notes)

    def _examples_of(self, contents: Contents, repeats: int, trigger: str) -> Iterator[Example]:
        self.unused += [self._name(path) for path in contents.strays()]
        for stem, paths in contents.pictures.items():
            names = [self._name(path) for path in paths]
            masks = contents.masks.get(stem, []) if self.use_masks else []
            if len(paths) > 1:
                self.problems.append(f"{' and '.join(names)} share caption and mask; rename all but one.")
            elif len(masks) > 1:
                self.problems.append(f"{names[0]} has {len(masks)} masks: {_some(map(self._name, masks))}; keep one.")
            else:
                mask = masks[0] if masks else None
                yield from self._example(paths[0], contents.captions.get(stem), mask, repeats, trigger)

    def _example(
        self, path: Path, caption: Path | None, mask: Path | None, repeats: int, trigger: str
    ) -> Iterator[Example]:
        """The example of one picture, unless any part of it is wrong: that goes to the problems."""
        before, size, text = len(self.problems), (0, 0), ""
        with self._noting():
            image = decoded(path, self._name(path))
            size = image.size
            if is_transparent(image):
                self.transparent.append(self._name(path))
            if mask:
                load_mask(mask, size, self._name(mask))
        with self._noting():
            text = self._caption(path, caption, trigger)
        if len(self.problems) == before:
            yield Example(path, text, mask, repeats, size)

    def _caption(self, path: Path, file: Path | None, trigger: str) -> str:
        name = self._name(path)
        written = read_text(file, self._name(file)) if file else None
        listed = self.texts.get(path)
        if file and listed is not None and listed != written:
            raise DatasetError(f"{name} has different captions in {METADATA} and {file.name}; keep one.")
        text = written if listed is None else listed
        if text is None or self.token is None:
            self.captionless.append(name)
            return self.prompt
        source = self._name(file) if file else f"{METADATA}, {name}"
        text = caption_for(text, self.token, trigger)
        if not text:
            raise DatasetError(f"{source} has an empty caption; write one, or remove it to use '{self.prompt}'.")
        if self.token not in text:
            if self.token_needed:
                raise DatasetError(f"{source}: '{text}' does not name {self.token}; write it where that stands.")
            self.tokenless.append(source)
        return text

    @contextmanager
    def _noting(self) -> Generator[None]:
        """Problems are collected, not raised, so that the user hears of all of them at once."""
        try:
            yield
        except DatasetError as error:
            self.problems.append(str(error))

    def _name(self, path: Path) -> str:
        """How the user calls a file: its path in the folder."""
        return path.relative_to(self.folder).as_posix()


def _if_mixed(names: list[str], examples: list[Example]) -> list[str]:
    """Names worth telling because others in the folder differ."""
    return names if len(names) < len(examples) else []


def _some(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
