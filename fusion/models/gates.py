"""Which rows of a layer's input belong to which concept token, while prompts flow through a pipeline.

Pipelines repeat, concatenate and reorder prompt embeddings before the UNet sees them (guidance, batches, negative
prompts, several images per prompt, SDXL's two encoders side by side). So the UNet's prompts are recognised by content:
attention in CLIP is causal, hence the last row of an encoded prompt depends on every token of it and identifies it.

What belongs to one call is kept per thread, so pipelines of the same components may draw in several threads.

Shapes: B prompts, T text positions, D embedding width.
"""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fusion.errors import GatingError

# Digests of prompts, oldest dropped first: at most 25 MB. A prompt has 3 of them in SD 1.x, about 300 in SDXL.
_REMEMBERED = 131_072

Positions = Mapping[str, tuple[int, ...]]  # token -> positions in one prompt, ascending


@dataclass(eq=False)
class TokenRows:
    """The rows of each token among those of a layer that is fed tokens, (B·T', D) flattened."""

    rows: Mapping[str, Tensor]  # token -> (n,) ascending
    size: int  # rows in all, to catch a layer whose input is not what the gate was read from
    _cache: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict[tuple[object, ...], "Tensor | None"])

    @property
    def tokens(self) -> Collection[str]:
        """The tokens in any of the prompts."""
        return self.rows.keys()

    def matching(self, gate: tuple[str, ...], x: Tensor) -> Tensor | None:
        """The rows of `x` that hold any token of `gate`, or None: the gate is shut and costs no arithmetic."""
        key = gate, x.device  # offloaded, a model computes on another device than its prompts came on
        if key not in self._cache:
            present = [self.rows[token] for token in gate if token in self.rows]
            self._cache[key] = torch.cat(present).unique().to(x.device) if present else None
        rows = self._cache[key]
        _check_size(gate, x, x.shape[:-1].numel(), self.size if rows is not None else None)
        return rows


@dataclass(eq=False)
class PictureRows:
    """The rows of each token in layers that see no tokens: the cells of a picture, or region, whose prompt holds it."""

    prompts: Mapping[str, Sequence[tuple[int, int]]]  # token -> (picture, which of its chunks)
    size: int  # pictures
    chunks: int = 1  # of each picture, those of its prompt and of each region's one after the other
    regions: "Regions | None" = None
    _cache: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict[tuple[object, ...], "Tensor | None"])

    @property
    def tokens(self) -> Collection[str]:
        return self.prompts.keys()

    def matching(self, gate: tuple[str, ...], x: Tensor) -> Tensor | None:
        """The cells of `x` (B, cells, C), flattened, or rows of `x` (B, C), whose prompt holds any token of `gate`."""
        cells = x.shape[1:-1].numel()
        key = gate, cells, x.ndim
        if key not in self._cache:
            holders = sorted({holder for token in gate for holder in self.prompts.get(token, ())})
            regions = self.regions.prompt_cells(cells, x.device) if self.regions and x.ndim > 2 else None
            whole = torch.arange(cells, device=x.device)
            parts = [b * cells + (regions[n * len(regions) // self.chunks] if regions else whole) for b, n in holders]
            rows = torch.cat(parts).unique() if parts else whole[:0]
            self._cache[key] = rows if len(rows) else None
        rows = self._cache[key]
        _check_size(gate, x, x.shape[0], self.size if rows is not None else None)
        return rows


@dataclass(eq=False)
class MaskedRows:
    """The rows of each token as masks, whose shapes do not depend on what the prompts are: for steps of training.

    Their kernels are the same for all batches of one shape, so a GPU can repeat them without the host.
    """

    masks: Mapping[str, Tensor]  # token -> (n,) of bool: rows of a layer that is fed tokens, or pictures

    @property
    def tokens(self) -> Collection[str]:
        """All tokens that are attached, whether or not they are in these prompts."""
        return self.masks.keys()

    def matching(self, gate: tuple[str, ...], x: Tensor) -> Tensor | None:
        """Which rows of `x`, flattened, hold any token of `gate`, or belong to a picture whose prompt does: (N,)."""
        masks = [self.masks[token] for token in gate if token in self.masks]
        if not masks:
            return None
        mask = masks[0] if len(masks) == 1 else torch.stack(masks).any(0)
        rows = x.shape[:-1].numel()
        _check_size(gate, x, rows % len(mask), 0)
        cells = rows // len(mask)
        return mask if cells == 1 else mask[:, None].expand(-1, cells).reshape(-1)


Rows = TokenRows | PictureRows | MaskedRows


class PreparedPrompts(Protocol):
    """Prompts whose tokens are known before the models run; `fusion.models.prompt_layout` has the one there is."""

    @property
    def ids(self) -> Mapping[str, Tensor]: ...

    @property
    def concepts(self) -> Mapping[str, Tensor]: ...

    def rows(self, component: str) -> Mapping[bool, Rows]:
        """The rows of each token in the layers of a component that see tokens (True), and in its other layers."""
        ...


class Regions(Protocol):
    """Which cells of a picture attend to which of its prompts; `fusion.generation.regions` has the one there is."""

    def prompt_cells(self, cells: int, device: torch.device) -> Sequence[Tensor]:
        """The cells, ascending, of every prompt, at the level of the UNet that has so many."""
        ...


class InputShapeError(GatingError):
    """A layer was given another input than the one that its gate was read from."""


def _check_size(gate: tuple[str, ...], x: Tensor, size: int, expected: int | None) -> None:
    if expected is not None and size != expected:
        raise InputShapeError(
            f"The gate of {', '.join(gate)} was read from {expected} rows, but this layer was given an input of shape "
            f"{tuple(x.shape)}. Call the whole pipeline, or attach with gating='none'."
        )


class _Calls(threading.local):
    """What belongs to the calls under way in one thread."""

    def __init__(self) -> None:
        self.regions: Regions | None = None  # of the pictures being drawn
        self.rows: dict[tuple[str, bool], Rows] = {}  # (component, by token or by picture)
        # The UNet's last embeddings with their version; weak, since they may hold the whole graph of the encoders.
        self.embeds: tuple[weakref.ref[Tensor], int] | None = None
        self.batch: PreparedPrompts | None = None
        self.outputs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # of layers fed by the prompt


class PromptTracker:
    """Remembers encoded prompts, and knows which rows of the calls under way belong to which token."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        """`widths`: text encoder component -> D, in the order in which the UNet's prompt embedding joins them."""
        self.widths = dict(widths)
        self._calls = _Calls()
        self._known: OrderedDict[bytes, Positions] = OrderedDict()
        self._lock = threading.Lock()  # of `_known`
        self._length = 0  # T of the prompts encoded last

    def outputs(self) -> "weakref.WeakKeyDictionary[Any, Any]":
        """Outputs of layers that are worth keeping from one call of this thread to the next."""
        return self._calls.outputs

    def set_regions(self, regions: Regions | None) -> None:
        """The chunks of this thread's prompts to come belong to `regions`; None: to whole pictures."""
        self._calls.regions, self._calls.embeds = regions, None

    @property
    def batch(self) -> PreparedPrompts | None:
        """The prompts of this thread's calls, where they are known before."""
        return self._calls.batch

    def set_batch(self, batch: PreparedPrompts | None) -> None:
        """Until it is None again, this thread's calls are with these prompts, and none is recognised."""
        self._calls.batch, self._calls.embeds = batch, None

    def start_batch(self, component: str) -> bool:
        """A component starts on the prompts that are known; False where there are none."""
        batch = self._calls.batch
        if batch is not None:
            self._calls.rows.update({(component, by_token): rows for by_token, rows in batch.rows(component).items()})
        return batch is not None

    def rows(self, component: str, by_token: bool) -> Rows | None:
        """The rows of the component's call under way; None before the first. Replaced at every call, so ask each time.

        Layers that see no tokens are gated picture by picture: open where the prompt holds the token at all, or region
        by region where the picture has some.
        """
        return self._calls.rows.get((component, by_token))

    def restoring_hook(self, component: str) -> Callable[[Tensor], None]:
        """A gradient hook that restores the rows of a component as they are now.

        Gradient checkpointing runs layers again in the backward pass, when the rows may be those of a later call, and
        possibly in a thread of autograd's own.
        """
        now = {key: rows for key, rows in self._calls.rows.items() if key[0] == component}

        def restore(_gradient: Tensor) -> None:
            self._calls.rows.update(now)
            self._calls.embeds = None

        return restore

    def start_text(self, component: str, prompts: Sequence[Positions], length: int, device: torch.device) -> None:
        """A text encoder starts on B prompts of T positions."""
        self._set_rows(component, [[prompt] for prompt in prompts], length, device)
        self._length = length

    def remember(self, component: str, prompts: Sequence[Positions], last_rows: Tensor) -> None:
        """Remember what B prompts were encoded to; `last_rows` (L, B, D): the last position of L candidate layers."""
        forms = [form for layer in last_rows.detach() for form in _forms(layer)]
        digests = [(component.encode() + d, p) for form in forms for d, p in zip(_digests(form), prompts, strict=True)]
        with self._lock:
            for digest, prompt in digests:
                self._known[digest] = prompt
                self._known.move_to_end(digest)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)

    def remember_scaled(self, before: Tensor, after: Tensor) -> None:
        """Remember that last rows (B, D') of encoded prompts were changed to others, as by weights of words."""
        widths = list(self.widths.values())
        parts = zip(
            torch.split(before.detach(), widths, dim=1), torch.split(after.detach(), widths, dim=1), strict=True
        )
        for component, (old, new) in zip(self.widths, parts, strict=True):
            prompts = [self._known.get(component.encode() + digest) for digest in _digests(old)]
            known = [number for number, prompt in enumerate(prompts) if prompt is not None]
            self.remember(component, [prompt for prompt in prompts if prompt is not None], new[None, known])

    def start_unet(self, embeds: Tensor) -> None:
        """The UNet starts on prompt embeddings (B, T', D'), T' a multiple of T for prompts encoded in chunks.

        Raises GatingError for embeddings this pipeline's text encoders did not make.
        """
        if self.start_batch("unet"):
            return
        calls, version = self._calls, 0 if embeds.is_inference() else embeds._version
        if calls.embeds is not None and calls.embeds[0]() is embeds and calls.embeds[1] == version:
            return
        length = self._length or embeds.shape[1]  # nothing encoded yet: only blanks will be known
        if embeds.shape[1] % length or embeds.shape[2] != sum(self.widths.values()):
            raise _unknown(f"Prompt embeddings of shape {tuple(embeds.shape)} do not fit the text encoders")
        ends = range(length, embeds.shape[1] + 1, length)
        chunks = [list(self._recognise(embeds[:, end - 1].detach())) for end in ends]
        self._set_rows("unet", list(zip(*chunks, strict=True)), length, embeds.device)
        calls.embeds = weakref.ref(embeds), version

    def _set_rows(
        self, component: str, prompts: Sequence[Sequence[Positions]], length: int, device: torch.device
    ) -> None:
        """Set the rows of B prompts, each of one or several chunks of `length` positions."""
        rows: dict[str, list[int]] = {}
        holders: dict[str, list[tuple[int, int]]] = {}
        size = 0  # positions so far
        chunks = max(map(len, prompts), default=1)
        for b, prompt in enumerate(prompts):
            for number, chunk in enumerate(prompt):
                for token, positions in chunk.items():
                    rows.setdefault(token, []).extend(size + p for p in positions)
                    holders.setdefault(token, []).append((b, number))
                size += length
        index = {token: torch.tensor(numbers, device=device) for token, numbers in rows.items()}
        self._calls.rows[component, True] = TokenRows(index, size)
        self._calls.rows[component, False] = PictureRows(holders, len(prompts), chunks, self._calls.regions)

    def _recognise(self, last_rows: Tensor) -> Iterator[Positions]:
        """The tokens of each of B prompts by their last rows (B, D'), both encoders' tokens joined."""
        parts = torch.split(last_rows, list(self.widths.values()), dim=1)
        digests = [_digests(part) for part in parts]
        blank = (last_rows == 0).all(dim=1).tolist()  # SDXL's empty negative prompt is all zeros
        for b in range(last_rows.shape[0]):
            joined: dict[str, set[int]] = {}
            for component, of_prompts in zip(self.widths, digests, strict=True):
                prompt = {} if blank[b] else self._known.get(component.encode() + of_prompts[b])
                if prompt is None:
                    raise _unknown(
                        f"The embedding of prompt {b + 1} was not made by this {component} while a token-gated adapter "
                        "was attached, or its last row was changed since (as by compel's word-)"
                    )
                for token, positions in prompt.items():
                    joined.setdefault(token, set()).update(positions)
            yield {token: tuple(sorted(positions)) for token, positions in joined.items()}


def _forms(rows: Tensor) -> list[Tensor]:
    """(B, D) rows as they are, and as they will be if the pipeline casts them to half precision."""
    return [rows, rows.half(), rows.bfloat16()] if rows.dtype == torch.float32 else [rows]


def _digests(rows: Tensor) -> list[bytes]:
    """The digests of (B, D) rows; equal values have equal digests in every dtype."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.float().cpu().contiguous().numpy()]


def _unknown(reason: str) -> GatingError:
    return GatingError(
        f"{reason}, so a gate cannot know where the tokens are. "
        "Encode prompts with this pipeline after attach(), or attach with gating='none'."
    )
