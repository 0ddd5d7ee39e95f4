"""A folder of pictures as training examples. Every file is checked here, before training starts.

    dog.png  dog.txt  masks/dog.png     a picture, its caption, its mask (or dog-masklabel.png, dog.mask.png)
    metadata.jsonl                      captions instead: {"file_name": "dog.png", "text": "a {token} asleep"}
    10_sks dog/                         pictures to repeat 10 times; "sks dog" and "sks" mean the token (kohya)

A picture without a caption has the instance prompt. `trigger_word` is a word of captions that becomes the token; those
without it then begin with the token. Any other caption that does not name the token is an error under token gating,
where nothing can be learned from it, and a warning without gates. Nothing is left out silently.
"""

import logging
import random
import re
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fusion.config import listing
from fusion.errors import DatasetError
from fusion.formats.picture_file import SUFFIXES, decode, is_transparent, load_mask, load_picture
from fusion.training import dataset_files as files
from fusion.training.buckets import Size, nearest_size
from fusion.training.caption_text import FixedTags, caption_for, shuffle_tags, split_caption
from fusion.training.config import MAX_REPEATS, TrainingConfig
from fusion.training.dataset_files import MASKS, METADATA, some, visible
from fusion.training.pictures import Cut, cut

logger = logging.getLogger(__name__)

_UNMASKED = TrainingConfig.model_fields["unmasked_weight"].default
_REPEATED = re.compile(r"([1-9]\d{0,99})_(.+)")  # kohya's folder names
MAX_USES = 1_000_000  # pictures of an epoch, repeats counted
_WARNINGS = {  # by kind; {} is the instance prompt
    "captionless": "Without a caption, so '{}' is used",
    "triggerless": "Captions without the trigger word, which now begin with the token",
    "tokenless": "Captions that do not name the token",
    "maskless": "Without a mask, so learned whole",
    "transparent": "With transparent parts, which are filled with white",
    "unmasking": "Masks that are white everywhere, so nothing is masked",
    "unused": "Not used",
}


@dataclass(frozen=True)
class Example:
    """One picture with its caption and mask."""

    image_path: Path
    caption: str
    mask_path: Path | None
    repeats: int
    size: tuple[int, int]  # width, height, upright
    fixed_tags: FixedTags = (0, 0)  # of a caption that is shuffled

    def caption_in(self, config: TrainingConfig, number: int, index: int) -> str:
        """The caption as the picture at `index` of batch `number`: a function of the seed and both numbers."""
        if not config.varies_captions():
            return self.caption
        draw = random.Random(f"caption {index} of batch {number} of seed {config.seed}")
        if draw.random() < config.caption_dropout_rate:
            return config.token if config.gating == "tokens" else ""
        return shuffle_tags(self.caption, self.fixed_tags, draw) if config.shuffle_caption else self.caption


@dataclass(frozen=True)
class Dataset:
    """Checked examples, and `warnings`: what the user may not expect about them."""

    examples: tuple[Example, ...]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def enlarged(self, sizes: Sequence[Size]) -> tuple[Example, ...]:
        """Examples that are smaller than the size that they are cut to."""
        targets = [(example, nearest_size(example.size, sizes)) for example in self.examples]
        return tuple(e for e, size in targets if e.size[0] < size[0] or e.size[1] < size[1])

    def buckets(self, sizes: Sequence[Size]) -> dict[Size, list[Example]]:
        """The examples by the size that they are cut to, the sizes in order."""
        buckets: dict[Size, list[Example]] = {}
        for example in self.examples:
            buckets.setdefault(nearest_size(example.size, sizes), []).append(example)
        return dict(sorted(buckets.items()))

    def order(self, batch_size: int, seed: int, sizes: Sequence[Size] | None = None) -> "BatchOrder":
        """Which examples make which batch; those of a batch are cut to one of the `sizes`."""
        repeats = tuple(example.repeats for example in self.examples)
        buckets = tuple(sizes.index(nearest_size(example.size, sizes)) for example in self.examples) if sizes else ()
        return BatchOrder(repeats, batch_size, seed, buckets)


@dataclass(frozen=True)
class BatchOrder:
    """Which examples make batch k: a function of the seed and k alone, so a resumed training continues exactly.

    Every epoch is a permutation of all examples, each as often as it is repeated; a batch may end one epoch and
    begin the next, so all batches are full. Each of several `buckets` has epochs of its own, and so many of the batches
    that every example is used as often as it is repeated.
    """

    repeats: tuple[int, ...]
    batch_size: int
    seed: int
    buckets: tuple[int, ...] = ()  # of each example; without any, all are of one

    def batch(self, number: int) -> tuple[int, ...]:
        """Indices of the examples in batch `number`, counted from 0; all are of one bucket."""
        if len(set(self.buckets)) > 1:
            return self._batch_of_bucket(number)
        first, length = number * self.batch_size, sum(self.repeats)
        epochs = range(first // length, (first + self.batch_size - 1) // length + 1)
        row = [index for epoch in epochs for index in self.epoch(epoch)]
        start = first - epochs.start * length
        return tuple(row[start : start + self.batch_size])

    def _batch_of_bucket(self, number: int) -> tuple[int, ...]:
        """In `length` batches, each bucket has one for each of its uses in an epoch, in an order that is drawn."""
        turn, position = divmod(number, sum(self.repeats))
        deck = [bucket for bucket, count in zip(self.buckets, self.repeats, strict=True) for _ in range(count)]
        order = random.Random(f"buckets {turn} of seed {self.seed}").sample(deck, len(deck))
        bucket = order[position]
        members = [index for index, other in enumerate(self.buckets) if other == bucket]
        inner = BatchOrder(tuple(self.repeats[index] for index in members), self.batch_size, self.seed)
        batch = inner.batch(turn * deck.count(bucket) + order[:position].count(bucket))
        return tuple(members[index] for index in batch)

    def epoch(self, number: int) -> list[int]:
        """All examples in the order of one epoch."""
        deck = [index for index, count in enumerate(self.repeats) for _ in range(count)]
        return random.Random(f"epoch {number} of seed {self.seed}").sample(deck, len(deck))


def prepare(
    example: Example, size: int | Size, config: TrainingConfig, generator: torch.Generator | None = None
) -> Cut:
    """The pixels of one example, cut to a size or square, as the config wants them.

    `generator` draws crops and flips.
    """
    picture, mask = load_picture(example.image_path), None
    if example.mask_path:
        mask = load_mask(example.mask_path, example.size)
    center, flip = config.center_crop, config.random_flip
    return cut(picture, mask, size, center_crop=center, random_flip=flip, generator=generator)


def instance_dataset(config: TrainingConfig) -> Dataset:
    """The pictures of the concept. Raises DatasetError naming every file with a problem."""
    return _Reader(config.instance_data_dir, config.with_token(config.instance_prompt), config).dataset()


def check_dataset(config: TrainingConfig) -> tuple[Dataset, list[Path], list[str]]:
    """What instance_dataset reads, all pictures that it looks at, and the problems for which it would refuse them.

    Raises DatasetError only where there is no folder.
    """
    reader = _Reader(config.instance_data_dir, config.with_token(config.instance_prompt), config)
    return reader.read(), reader.paths, reader.problems


def class_dataset(config: TrainingConfig) -> Dataset:
    """The class pictures there are, all with the class prompt; none at all is no error, as they can be drawn."""
    folder = config.class_folder()
    if not config.class_prompt or not folder.exists():
        return Dataset(())
    return _Reader(folder, config.class_prompt, None).dataset()


class _Reader:
    """Reads one dataset folder, collecting problems and warnings over all files."""

    def __init__(self, folder: Path, prompt: str, config: TrainingConfig | None) -> None:
        """`prompt` is for pictures without a caption; without a config captions and masks are not read."""
        if not folder.is_dir():
            raise DatasetError(f"'{folder}' is no folder; name the one that holds the pictures.")
        self.folder, self.prompt, self.config = folder, prompt, config
        self.problems: list[str] = []
        self.names = defaultdict[str, list[str]](list)  # of files, by kind of warning
        self.examples: list[Example] = []
        self.paths: list[Path] = []  # of all pictures
        self.texts = files.read_metadata(folder, self.problems, self.names["unused"]) if config else {}

    def dataset(self) -> Dataset:
        """What `read` gives; its warnings are logged, and problems raised as one DatasetError."""
        dataset = self.read()
        if self.problems:
            raise DatasetError(f"'{self.folder.name}': {listing(self.problems)}")
        for warning in dataset.warnings:
            logger.warning("'%s': %s", self.folder.name, warning)
        return dataset

    def read(self) -> Dataset:
        """The examples of the folder, of its repeated sub-folders and of those that metadata names."""
        folders = {self.folder, *(path.parent for path in self.texts)}
        folders |= {path for path in visible(self.folder) if path.is_dir() and _REPEATED.fullmatch(path.name)}
        for folder in sorted(folders):
            self._read(folder, folders)
        if self.config and not self.examples and not self.problems:
            kinds = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
            self.problems.append(f"there are no pictures in it; put some there ({kinds})")
        if (uses := sum(example.repeats for example in self.examples)) > MAX_USES:
            self.problems.append(f"its pictures are repeated to {uses} an epoch; the limit is {MAX_USES}")
        maskless = len(self.names["maskless"]) >= len(self.examples)
        if self.config and self.config.unmasked_weight != _UNMASKED and maskless:
            self.names["unused"].append("the setting unmasked_weight, as no masks are")
        for kind in ("captionless", "maskless"):  # a warning only where others in the folder have one
            if len(self.names[kind]) >= len(self.examples):
                del self.names[kind]
        warnings = tuple(
            f"{text.format(self.prompt)}: {some({*self.names[kind]})}."
            for kind, text in _WARNINGS.items() if self.names[kind]
        )  # fmt: skip
        return Dataset(tuple(self.examples), warnings)

    def _read(self, folder: Path, folders: set[Path]) -> None:
        """The examples of one of the `folders` that are read."""
        pictures, captions, masks, unused = files.sort_files(
            folder, *([self.config.caption_extension] if self.config else [])
        )
        parents = {parent for path in folders for parent in (path, *path.parents)}
        unused += [path for path in visible(folder) if path.is_dir() and path not in parents and path.name != MASKS]
        if folder != self.folder and (folder / METADATA).exists():
            unused.append(folder / METADATA)
        self.names["unused"] += [f"{self._name(path)}/" if path.is_dir() else self._name(path) for path in unused]
        match = _REPEATED.fullmatch(folder.name) if folder != self.folder else None
        repeats, trigger = (int(match[1]), match[2].strip()) if match else (1, "")
        if repeats > MAX_REPEATS:
            limit = f"folders repeat their pictures at most {MAX_REPEATS} times"
            self.problems.append(f"{self._name(folder)}/: {limit}; rename it.")
            return
        for stem, paths in pictures.items():
            self.paths += paths
            own_masks = masks[stem] if self.config and self.config.use_masks else []
            with self._collected():
                if len(paths) > 1:
                    names = " and ".join(map(self._name, paths))
                    raise DatasetError(f"{names} share caption and mask; rename all but one.")
                if len(own_masks) > 1:
                    names = some(map(self._name, own_masks))
                    raise DatasetError(f"{self._name(paths[0])} has {len(own_masks)} masks: {names}; keep one.")
                mask, caption, size, text = next(iter(own_masks), None), next(iter(captions[stem]), None), None, ""
                with self._collected():
                    size = self._check(paths[0], mask)
                with self._collected():
                    text = self._caption(paths[0], caption, trigger)
                if size and text:
                    times, fixed = repeats * (self.config.repeats if self.config else 1), (0, 0)
                    if self.config:
                        text, fixed = split_caption(text, self.config.keep_tokens, self.config.keep_tokens_separator)
                    self.examples.append(Example(paths[0], text, mask, times, size, fixed))

    def _check(self, path: Path, mask: Path | None) -> tuple[int, int]:
        """The size of a picture that can be read, as its mask can."""
        image = decode(path, self._name(path))
        if is_transparent(image):
            self.names["transparent"].append(self._name(path))
        if mask:
            if load_mask(mask, image.size, self._name(mask)).getextrema() == (255, 255):
                self.names["unmasking"].append(self._name(mask))
        else:
            self.names["maskless"].append(self._name(path))
        return image.size

    def _caption(self, path: Path, file: Path | None, trigger: str) -> str:
        name, listed = self._name(path), self.texts.get(path)
        written = files.read_text(file, self._name(file)) if file and self.config else None
        if None not in (listed, written) and listed != written:
            raise DatasetError(f"{name} has different captions in {METADATA} and {self._name(file or path)}; keep one.")
        text = written if listed is None else listed
        if text is None or not self.config:
            self.names["captionless"].append(name)
            return self.prompt
        source, token = self._name(file) if file else f"{METADATA}, {name}", self.config.token
        text = caption_for(text, token, trigger, self.config.trigger_word)
        if not text:
            raise DatasetError(f"{source} has an empty caption; write one, or remove it to use '{self.prompt}'.")
        if token not in text and self.config.trigger_word:
            self.names["triggerless"].append(source)
            return f"{token}, {text}"
        if token not in text:
            if self.config.gating == "tokens":
                raise DatasetError(
                    f"{source}: '{text[: files.MAX_QUOTE]}' does not name {token}; write it where that stands, or set "
                    "trigger_word."
                )
            self.names["tokenless"].append(source)
        return text

    @contextmanager
    def _collected(self) -> Generator[None]:
        """Problems are collected, not raised, so that the user learns of all of them at once."""
        try:
            yield
        except DatasetError as error:
            self.problems.append(str(error))

    def _name(self, path: Path) -> str:
        """How the user calls a file: its path in the folder."""
        return path.relative_to(self.folder).as_posix()
