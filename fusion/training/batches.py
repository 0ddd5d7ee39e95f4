"""What each step trains on: latents, captions, masks and sizes, as functions of the step's number.

Shapes: B examples, C latent channels, H W latent size.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.generation import generate
from fusion.models.conditioning import TimeIds
from fusion.training.config import TrainingConfig
from fusion.training.dataset import Dataset, Example, class_dataset, instance_dataset, prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, C, H, W), scaled as the UNet expects
    captions: list[str]
    time_ids: list[TimeIds]
    mask: Tensor | None  # (B, 1, H, W), what each place counts


@dataclass(frozen=True)
class Encoded:
    """One prepared picture: its latents, mask and sizes."""

    latents: Tensor  # (C, H, W), the mode: the autoencoder's own spread is far below the noise of training
    mask: Tensor | None  # (1, H, W)
    time_ids: TimeIds


class Batches:
    """The concept's pictures, and class pictures under prior preservation. Checked at once, encoded by `prepare`."""

    def __init__(self, pipe: Any, config: TrainingConfig) -> None:
        """Raises DatasetError naming every file with a problem."""
        self.pipe, self.config = pipe, config
        self.resolution = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.instances = instance_dataset(config)
        self.classes: Dataset | None = None
        self._encoded: dict[Example, Encoded] = {}
        if small := self.instances.smaller_than(self.resolution):
            logger.warning(
                "%d of %d pictures are smaller than %d px and are enlarged, first '%s'.",
                len(small), len(self.instances), self.resolution, small[0].image_path.name,
            )  # fmt: skip

    @property
    def digest(self) -> str:
        """Of captions and files, to know on resuming that the examples are the same."""
        sha = hashlib.sha256()
        for example in self.instances.examples:
            sha.update(f"{example.caption} {example.repeats}".encode() + example.image_path.read_bytes())
        return sha.hexdigest()[:16]

    def prepare(self) -> None:
        """Draw the class pictures that are missing, and encode what may be encoded once."""
        if self.config.with_prior_preservation:
            self._draw_class_pictures()
            self.classes = class_dataset(self.config)
        if self.config.caches_latents():
            for dataset in (self.instances, self.classes):
                for example in dataset.examples if dataset else ():
                    self._encoded[example] = self._encode(example, None)

    def instance(self, number: int, generator: torch.Generator) -> Batch:
        """The concept's pictures of batch `number`; `generator` draws crops and flips."""
        return self._batch(self.instances, number, generator)

    def prior(self, number: int, generator: torch.Generator) -> Batch | None:
        """The class pictures of batch `number`, None without prior preservation."""
        return self._batch(self.classes, number, generator) if self.classes else None

    def _batch(self, dataset: Dataset, number: int, generator: torch.Generator) -> Batch:
        order = dataset.order(self.config.train_batch_size, self.config.seed)
        examples = [dataset.examples[i] for i in order.batch(number)]
        encoded = [self._encoded.get(example) or self._encode(example, generator) for example in examples]
        return Batch(
            torch.stack([e.latents for e in encoded]),
            [example.caption for example in examples],
            [e.time_ids for e in encoded],
            self._mask(encoded),
        )

    def _mask(self, encoded: list[Encoded]) -> Tensor | None:
        """Masks as weights: 1 inside, `unmasked_weight` outside; pictures without one count everywhere."""
        if all(e.mask is None for e in encoded):
            return None
        outside = self.config.unmasked_weight
        whole = torch.ones_like(encoded[0].latents[:1])
        return torch.stack([whole if e.mask is None else outside + (1 - outside) * e.mask for e in encoded])

    def _encode(self, example: Example, generator: torch.Generator | None) -> Encoded:
        """Pixels to scaled latents, by an autoencoder in float32 where half precision overflows."""
        picture = prepare(example, self.resolution, self.config, generator)
        vae, device = self.pipe.vae, self.pipe.unet.device
        stored = vae.dtype
        if stored == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)
        with torch.no_grad():
            found = vae.encode(picture.pixels[None].to(device, vae.dtype)).latent_dist.mode()
        if vae.dtype != stored:
            vae.to(stored)
        latents = found[0].float() * vae.config.scaling_factor
        mask = picture.mask
        if mask is not None:
            mask = F.interpolate(mask[None].to(device), latents.shape[-2:], mode="area")[0]
        size = (self.resolution, self.resolution)
        return Encoded(latents, mask, (*picture.original_size, *picture.crop_top_left, *size))

    def _draw_class_pictures(self) -> None:
        """Class pictures by the base, as many as are missing; the adapter attached is untrained and changes nothing."""
        config, folder = self.config, self.config.class_folder()
        missing, seed = config.num_class_images - len(class_dataset(config)), 0
        while missing > 0:
            for picture in generate(self.pipe, config.class_prompt or "", seed=seed, batch=config.sample_batch_size):
                path = folder / f"drawn-{seed:05d}.png"
                if missing > 0 and not path.exists():
                    picture.save(path)
                    missing -= 1
                seed += 1
