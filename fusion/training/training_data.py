"""What each step trains on: latents, captions, masks and sizes, as functions of the step's number.

Shapes: B examples, C latent channels, H W latent size.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.errors import FormatError
from fusion.generation.config import GenerationConfig
from fusion.generation.drawing import generate
from fusion.models.autoencoder import encode_pixels
from fusion.models.denoising import TimeIds
from fusion.models.pipeline import Pipeline
from fusion.output_files import check_output
from fusion.progress import OnPhase
from fusion.training.buckets import Size, nearest_size, training_sizes
from fusion.training.config import TrainingConfig
from fusion.training.dataset import Dataset, Example, class_dataset, instance_dataset, prepare
from fusion.training.encoded_pictures import Encoded, encoding_digest, read_encoded, write_encoded

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    latents: Tensor  # (B, C, H, W), scaled as the UNet expects
    mask: Tensor  # (B, 1, H, W), how much each position counts
    time_ids: list[TimeIds]
    captions: list[str]
    weights: Tensor  # (B,), how much each example counts: the concept's share, and that of class pictures


class TrainingData:
    """The concept's pictures, and class pictures under prior preservation. Checked at once, encoded by `prepare`."""

    def __init__(self, pipe: Pipeline, config: TrainingConfig) -> None:
        """Raises DatasetError naming every file with a problem, ConfigError for a resolution the base cannot encode."""
        self.pipe, self.config = pipe, config
        self.resolution = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.sizes = training_sizes(config, self.resolution, pipe.vae_scale_factor)
        self.instances = instance_dataset(config)
        self.classes = class_dataset(config) if config.uses_class_pictures() else None
        self._encoded: dict[tuple[Example, Size], Encoded] = {}
        if small := self.instances.enlarged(self.sizes):
            first, sizes = small[0].image_path.name, "their bucket" if config.enable_bucket else f"{self.resolution} px"
            logger.warning("%d pictures are smaller than %s and enlarged: %s, …", len(small), sizes, first)

    def digests(self) -> dict[str, str]:
        """Of the pictures with their captions and repeats, of masks and of class pictures, to compare on resuming."""
        examples, classes = self.instances.examples, self.classes.examples if self.classes else ()
        masks = [example.mask_path for example in examples]
        return {
            "pictures": _digest(f"{e.caption} {e.repeats}".encode() + e.image_path.read_bytes() for e in examples),
            "fixed_tags": str([example.fixed_tags for example in examples])
            if self.config.keep_tokens_separator
            else "",
            "masks": _digest(f"{k} ".encode() + m.read_bytes() for k, m in enumerate(masks) if m),
            "class_pictures": _digest(example.image_path.read_bytes() for example in classes),
        }

    def prepare(self, on_progress: OnPhase | None = None, run: Path | None = None) -> None:
        """Draw the class pictures that are missing, and encode what may be encoded once.

        What lies encoded in the folder of a `run` that is resumed is read.
        """
        if self.classes is not None and len(self.classes) < self.config.num_class_images:
            self._draw_class_pictures(self.config.num_class_images - len(self.classes), on_progress)
            self.classes = class_dataset(self.config)
        if not self.config.caches_latents():
            return
        pictures = self._pictures()
        encoded = read_encoded(run, len(pictures), self._digest(), self.pipe.unet.device) if run else []
        for number, (example, size) in enumerate([] if encoded else pictures):
            if on_progress:
                on_progress("encoding pictures", number, len(pictures))
            encoded.append(self._encode(example, size, None))
        self._encoded = dict(zip(pictures, encoded, strict=True))

    def write(self, run: Path) -> None:
        """Write what is encoded into the folder of a run, beside its checkpoints, or warn."""
        try:
            if self._encoded:
                write_encoded(run, list(self._encoded.values()), self._digest())
        except FormatError as error:
            logger.warning("%s A resumed training will encode its pictures again.", error)

    def _pictures(self) -> list[tuple[Example, Size]]:
        """What is encoded once: each picture at its size, class pictures at all of these sizes."""
        buckets = self.instances.buckets(self.sizes)
        pictures = [(example, size) for size, examples in buckets.items() for example in examples]
        return pictures + [(example, size) for example in (self.classes or Dataset(())).examples for size in buckets]

    def _digest(self) -> str:
        sizes = [size for _, size in self._pictures()]
        return encoding_digest(self.pipe.vae, self.digests(), sizes, self.config.unmasked_weight)

    def batch(self, number: int, generator: torch.Generator) -> Batch:
        """Batch `number`, class pictures after the concept's; `generator` draws crops and flips."""
        config, order = self.config, self.instances.order(self.config.train_batch_size, self.config.seed, self.sizes)
        examples = [self.instances.examples[i] for i in order.batch(number)]
        captions = [example.caption_in(config, number, i) for i, example in enumerate(examples)]
        size, weights = nearest_size(examples[0].size, self.sizes), [1.0] * len(examples)
        if self.classes:
            order = self.classes.order(config.train_batch_size, config.seed)
            examples += (class_examples := [self.classes.examples[i] for i in order.batch(number)])
            captions += [example.caption for example in class_examples]
            weights = [2.0] * config.train_batch_size + [2 * config.prior_loss_weight] * config.train_batch_size
        encoded = [self._encoded.get((example, size)) or self._encode(example, size, generator) for example in examples]
        latents, masks, time_ids = zip(*encoded, strict=True)
        return Batch(torch.stack(latents), torch.stack(masks), list(time_ids), captions, latents[0].new_tensor(weights))

    def _encode(self, example: Example, size: Size, generator: torch.Generator | None) -> Encoded:
        picture = prepare(example, size, self.config, generator)
        latents = encode_pixels(self.pipe, picture.pixels[None])[0].to(self.pipe.unet.device)
        mask, outside = torch.ones_like(latents[:1]), self.config.unmasked_weight
        if picture.mask is not None:
            inside = F.interpolate(picture.mask[None].to(latents.device), latents.shape[-2:], mode="area")[0]
            mask = outside + (1 - outside) * inside
        return latents, mask, (*picture.original_size, *picture.crop_top_left, size[1], size[0])

    def _draw_class_pictures(self, missing: int, on_progress: OnPhase | None) -> None:
        """Class pictures by the base itself, as no adapter is attached yet. Raises OutputError."""
        config, folder = self.config, self.config.class_folder()
        check_output(folder / "drawn-00000.png", size=missing * 3 * self.resolution**2, overwrite=True)
        free = (seed for seed in itertools.count() if not _class_picture(folder, seed).exists())
        seeds, done = list(itertools.islice(free, missing)), 0
        while done < missing:
            first, end = seeds[done], min(done + config.sample_batch_size, missing)
            count = next((i for i, seed in enumerate(seeds[done:end]) if seed != first + i), end - done)
            if on_progress:
                on_progress("drawing class pictures", done, missing)
            drawing = GenerationConfig(prompt=config.class_prompt or "", seed=first, num_images=count)
            for picture in generate(self.pipe, drawing):
                picture.save(_class_picture(folder, seeds[done]))
                done += 1


def _class_picture(folder: Path, seed: int) -> Path:
    return folder / f"drawn-{seed:05d}.png"


def _digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over all parts, 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]
