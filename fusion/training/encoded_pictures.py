"""Encoded pictures beside the checkpoints of a run, so that a training that is resumed encodes none again.

    <output_dir>/checkpoints/<output name>/<run>/latents.safetensors

The file is of one autoencoder, one set of pictures and one way to cut them; of any other it is not used.

Shapes: C latent channels, H W latent size.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion.adapters.adapter import content
from fusion.errors import FormatError
from fusion.formats.safetensors_file import opened, write_file

FILE = "latents.safetensors"
_SAMPLE = 2**12  # numbers of each weight of the autoencoder that are digested
# A picture's latents (C, H, W), its mask (1, H, W), and the numbers that SDXL is conditioned on.
Encoded = tuple[Tensor, Tensor, tuple[int, ...]]


def encoding_digest(vae: nn.Module, pictures: Mapping[str, str], sizes: Sequence[tuple[int, int]], mask: float) -> str:
    """SHA-256 over what encoded pictures depend on: the autoencoder, digests of the pictures, the size of each, and
    the weight outside of masks.
    """
    sha = hashlib.sha256(f"{sorted(pictures.items())} {list(sizes)} {mask}".encode())
    for parameter in vae.parameters():
        sha.update(content(parameter.detach().flatten()[:_SAMPLE]))
    return sha.hexdigest()


def write_encoded(folder: Path, encoded: Sequence[Encoded], digest: str) -> None:
    """Write them into the folder of a run, unless they are there. Raises FormatError where that is not possible."""
    if (folder / FILE).exists():
        return
    tensors: dict[str, Tensor] = {}
    for number, (latents, mask, sizes) in enumerate(encoded):
        tensors |= {f"{number}.latents": latents, f"{number}.mask": mask, f"{number}.sizes": torch.tensor(sizes)}
    write_file(folder / FILE, tensors, {"digest": digest}, "float32")


def read_encoded(folder: Path, count: int, digest: str, device: torch.device) -> list[Encoded]:
    """The pictures in the folder of a run, in their order; none where they are others, or cannot be read."""
    try:
        with opened(folder / FILE) as file:
            if file.metadata.get("digest") != digest or len(file.shapes) != 3 * count:
                return []
            parts = [[file.tensor(f"{n}.{key}").to(device) for key in ("latents", "mask")] for n in range(count)]
            sizes = [tuple(map(int, file.tensor(f"{n}.sizes").tolist())) for n in range(count)]
    except (FormatError, KeyError):
        return []
    return [(latents, mask, ids) for (latents, mask), ids in zip(parts, sizes, strict=True)]
