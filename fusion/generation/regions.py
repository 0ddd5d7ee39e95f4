"""Regions of a picture, each with a prompt of its own: region-aware attention (Gu et al. 2023, arXiv 2305.18292).

The regions' prompts are encoded with the picture's and appended to it, (B, (1 + R)·n·T, D). In cross-attention a cell
that regions cover attends to their prompts, to the mean of several, every other cell to the picture's. A concept's
branch in a layer that sees no tokens acts at the cells whose prompt holds its token. So what a region's concept does
in these layers, no cell outside the region sees; cells still meet in self-attention and convolutions.

Shapes: B pictures, R regions, n chunks of T text positions, D embedding width, H W latent size, N cells of one level of
the UNet.
"""

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

from fusion.errors import ConfigError, GatingError
from fusion.generation.config import Region
from fusion.models.model_state import attached_state
from fusion.models.pipeline import Pipeline

# Ways to compute one attention, which differ by rounding.
_PLAIN = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


class Cover:
    """Which cells of an (H, W) latent attend to which prompt: the picture's, then each region's."""

    def __init__(self, regions: Sequence[Region], height: int, width: int) -> None:
        """Raises ConfigError for a region that holds no cell."""
        self.regions, self.height, self.width = tuple(regions), height, width
        self._levels: dict[tuple[int, torch.device], tuple[list[Tensor], Tensor]] = {}
        for region in regions:
            if not region.cover(height, width).any():
                raise ConfigError(f"Region '{region.prompt}' is too small: it holds none of {width}x{height} cells.")

    def prompt_cells(self, cells: int, device: torch.device) -> list[Tensor]:
        """The cells (n,) of each of 1 + R prompts, at the level of `cells` cells. GatingError for no such level."""
        return self._level(cells, device)[0]

    def shares(self, cells: int, device: torch.device) -> Tensor:
        """What each prompt counts at a cell, (N,): one over the number of prompts it attends to."""
        return self._level(cells, device)[1]

    def _level(self, cells: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
        if (cells, device) not in self._levels:
            height, width = self.height, self.width
            while height * width > cells:
                height, width = -(-height // 2), -(-width // 2)
            if height * width != cells:
                raise GatingError(f"A layer of the UNet has {cells} cells, no level of {self.width}x{self.height}.")
            covers = torch.stack([region.cover(height, width).flatten() for region in self.regions])  # (R, N)
            every = torch.cat([~covers.any(dim=0, keepdim=True), covers]).to(device)  # (1 + R, N)
            self._levels[cells, device] = [row.nonzero()[:, 0] for row in every], 1 / every.sum(dim=0)
        return self._levels[cells, device]


class RegionAttention:
    """A cross-attention processor for prompts of 1 + R parts: every cell attends to its own parts.

    Threads that draw no regions go on with the module's own processor.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self.covers: dict[int, Cover] = {}  # by the threads that draw regions

    @torch.compiler.disable
    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **_: Any) -> Tensor:
        """From (B, N, C) and (B, (1 + R)·n·T, D) to (B, N, C)."""
        if (cover := self.covers.get(threading.get_ident())) is None:
            return self.own(attn, hidden_states, encoder_hidden_states, *args, **_)
        cells = cover.prompt_cells(hidden_states.shape[1], hidden_states.device)
        shares = cover.shares(hidden_states.shape[1], hidden_states.device)
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, N or (1 + R)·n·T, width)
            for part in (
                attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            )
        )  # fmt: skip
        mixed = torch.zeros_like(query)
        parts = zip(cells, key.chunk(len(cells), dim=2), value.chunk(len(cells), dim=2), strict=True)
        for rows, keys, values in parts:
            attended = F.scaled_dot_product_attention(query[:, :, rows], keys, values)
            mixed.index_add_(2, rows, attended * shares[rows, None].to(attended.dtype))
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


_lock = threading.Lock()  # of setting processors


@contextmanager
def drawing_regions(pipe: Pipeline, cover: Cover) -> Generator[None]:
    """Let the pictures that this thread draws follow `cover`: cross-attention, and gates of layers that see no tokens.

    Raises ConfigError where other attention processors are set already.
    """
    state, thread = attached_state(pipe), threading.get_ident()
    modules: list[Any] = [m for name, m in pipe.unet.named_modules() if name.rpartition(".")[2] == "attn2"]
    with _lock:
        for processor in (module.processor for module in modules):
            if type(processor) not in (*_PLAIN, RegionAttention):
                name = type(processor).__name__
                raise ConfigError(f"Regions cannot be drawn with {name} attention; reset the UNet's.")
        for module in modules:
            if not isinstance(module.processor, RegionAttention):
                module.set_processor(RegionAttention(module.processor))
            module.processor.covers[thread] = cover
    try:
        if state is not None:
            state.tracker.set_regions(cover)
        yield
    finally:
        if state is not None:
            state.tracker.set_regions(None)
        with _lock:
            for module in modules:
                del module.processor.covers[thread]
                if not module.processor.covers:
                    module.set_processor(module.processor.own)
