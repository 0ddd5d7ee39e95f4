"""Which cells of a picture belong to which concept of its prompt, by how much its token changes the prediction there.

Shapes: C concepts, H W latent size.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT_SHARE = 0.25  # of the steps, after which the layout is settled
MIN_STEPS = 4  # so that a quarter of them is one
MIN_CHANGE = 0.2  # of a concept's largest change; where it changes less, the prompt of the picture applies


def by_nouns(prompt: str, nouns: Mapping[str, str], keep: Collection[str] = ()) -> str:
    """A prompt in which all concepts but those of the tokens `keep` are called by their nouns."""
    for token, noun in nouns.items():
        if token not in keep:
            prompt = prompt.replace(token, noun)
    return prompt


def cells_by_concept(maps: Tensor) -> Tensor:
    """(C, H, W) changes to (C, H, W) bool, no cell twice: smoothed, each against its own largest, the larger wins."""
    reach = min(maps.shape[-2:]) // 16
    smooth = F.avg_pool2d(maps[None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[0]
    shares = smooth / smooth.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    owner = F.one_hot(shares.argmax(dim=0), len(maps)).permute(2, 0, 1).bool()
    return owner & (shares > MIN_CHANGE)
