"""Where concept tokens stand in the prompts that flow through a pipeline.

Pipelines repeat, concatenate and reorder prompt embeddings before the UNet sees them (guidance, batches, negative
prompts, several images per prompt, SDXL's two encoders side by side). So the UNet's prompts are recognised by content:
attention in CLIP is causal, hence the last row of an encoded prompt depends on every token of it and serves as its
name.

Shapes: B prompts, T text positions, D embedding width.
"""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fusion.errors import GatingError

# Names kept, oldest dropped first: at most 25 MB. A prompt has 3 of them in SD 1.x, about 300 in SDXL.
_REMEMBERED = 131_072

Positions = Mapping[str, tuple[int, ...]]  # token -> positions in one prompt, ascending


@dataclass
class TokenRows:
    """Where tokens stand among the rows of a layer that is fed them, (B·T', D) flattened."""

    rows: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # token -> (n,) ascending
    size: int = 0  # rows in all, to catch a layer whose input is not what the gate was read from
    _joined: dict[tuple[str, ...], Tensor | None] = field(default_factory=dict[tuple[str, ...], "Tensor | None"])

    @property
    def quiet(self) -> bool:
        """No concept's token stands anywhere: ten shut gates cost one question."""
        return not self.rows

    def open_rows(self, gate: tuple[str, ...], x: Tensor) -> Tensor | None:
        """The rows of `x` at which any token of `gate` stands, or None: the gate is shut and costs no arithmetic."""
        if gate not in self._joined:
            present = [self.rows[token] for token in gate if token in self.rows]
            self._joined[gate] = torch.cat(present).unique() if present else None
        rows = self._joined[gate]
        _check_size(gate, x, x.shape[:-1].numel(), self.size if rows is not None else None)
        return rows


@dataclass
class PictureRows:
    """Which pictures' prompts hold a token, for layers that see none: all cells of a picture, or those of a region."""

    prompts: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict[str, "Sequence[tuple[int, int]]"])
    size: int = 0  # pictures
    routing: "Routing | None" = None
    _joined: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict[tuple[object, ...], "Tensor | None"])

    @property
    def quiet(self) -> bool:
        return not self.prompts

    def open_rows(self, gate: tuple[str, ...], x: Tensor) -> Tensor | None:
        """The cells of `x` (B, cells, C), flattened, or rows of `x` (B, C), whose prompt holds any token of `gate`."""
        cells = x.shape[1:-1].numel()
        key = gate, cells, x.ndim
        if key not in self._joined:
            held = sorted({place for token in gate for place in self.prompts.get(token, ())})  # (picture, prompt)
            covered = self.routing.covered(cells, x.device) if self.routing and x.ndim > 2 else None
            whole = torch.arange(cells, device=x.device)
            parts = [b * cells + (whole if covered is None else covered[prompt]) for b, prompt in held]
            rows = torch.cat(parts).unique() if parts else whole[:0]
            self._joined[key] = rows if len(rows) else None
        rows = self._joined[key]
        _check_size(gate, x, x.shape[0], self.size if rows is not None else None)
        return rows


Scope = TokenRows | PictureRows


class Routing(Protocol):
    """Which cells of a picture attend to which of its prompts; `fusion.generation.regions` has the one there is."""

    def covered(self, cells: int, device: torch.device) -> Sequence[Tensor]:
        """The cells, ascending, of every prompt, at the level of the UNet that has so many."""
        ...


def _check_size(gate: tuple[str, ...], x: Tensor, given: int, expected: int | None) -> None:
    if expected is not None and given != expected:
        raise GatingError(
            f"The gate of {', '.join(gate)} was read from {expected} rows, but this layer was given an input of shape "
            f"{tuple(x.shape)}. Call the whole pipeline, or attach with gating='none'."
        )


class PromptTracker:
    """Remembers encoded prompts, and tells text encoder and UNet layers which rows belong to which token."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        """`widths`: text encoder component -> D, in the order in which the UNet's prompt embedding joins them."""
        self.widths = dict(widths)
        self._routing: Routing | None = None  # of the pictures being drawn
        self._scopes: dict[tuple[str, bool], Scope] = {}  # (component, by token or by picture)
        self._known: OrderedDict[bytes, Positions] = OrderedDict()
        self._length = 0  # T of the prompts remembered last
        # Read last by the UNet, with its version; weak, since it may hold the whole graph of the text encoders.
        self._last: tuple[weakref.ref[Tensor], int] | None = None

    def route(self, routing: Routing | None) -> None:
        """The chunks of the prompts to come belong to the regions of `routing`; None: to whole pictures."""
        self._routing, self._last = routing, None

    def scope(self, component: str, sees_tokens: bool) -> Scope:
        """The scope the gates of a component's layers read. Scopes are replaced at every call, so ask each time.

        Layers that see no tokens are gated picture by picture: open where the prompt holds the token at all, or region
        by region where the picture has some.
        """
        return self._scopes.get((component, sees_tokens)) or TokenRows()

    def resumption(self, component: str) -> Callable[[Tensor], None]:
        """A gradient hook that brings a component's scopes of now back.

        Gradient checkpointing runs layers again on the way back, when the scopes may be those of a later call.
        """
        now = {key: scope for key, scope in self._scopes.items() if key[0] == component}

        def resume(_gradient: Tensor) -> None:
            self._scopes.update(now)
            self._last = None

        return resume

    def begin_text(self, component: str, prompts: Sequence[Positions], length: int, device: torch.device) -> None:
        """A text encoder starts on B prompts of T positions."""
        self._open(component, [[prompt] for prompt in prompts], length, device)
        self._length = length

    def end_text(self, component: str, prompts: Sequence[Positions], last_rows: Tensor) -> None:
        """Remember what B prompts were encoded to; `last_rows` (L, B, D): the last position of L candidate layers."""
        for layer in last_rows.detach():
            for form in _forms(layer):
                for name, prompt in zip(_names(form), prompts, strict=True):
                    self._known[component.encode() + name] = prompt
                    self._known.move_to_end(component.encode() + name)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def begin_unet(self, embeds: Tensor) -> None:
        """The UNet starts on prompt embeddings (B, T', D'), T' a multiple of T for prompts encoded in chunks.

        Raises GatingError for embeddings this pipeline's text encoders did not make.
        """
        version = 0 if embeds.is_inference() else embeds._version
        if self._last is not None and self._last[0]() is embeds and self._last[1] == version:
            return
        length = self._length or embeds.shape[1]  # nothing encoded yet: only blanks will be known
        if embeds.shape[1] % length or embeds.shape[2] != sum(self.widths.values()):
            raise GatingError(
                _strange(f"Prompt embeddings of shape {tuple(embeds.shape)} do not fit the text encoders")
            )
        chunks = [
            list(self._recognise(embeds[:, end - 1].detach())) for end in range(length, embeds.shape[1] + 1, length)
        ]
        self._open("unet", list(zip(*chunks, strict=True)), length, embeds.device)
        self._last = weakref.ref(embeds), version

    def _open(self, component: str, prompts: Sequence[Sequence[Positions]], length: int, device: torch.device) -> None:
        """Scopes for B prompts, each of one or several chunks of `length` positions."""
        rows: dict[str, list[int]] = {}
        held: dict[str, list[tuple[int, int]]] = {}
        size = 0  # positions so far
        for b, chunks in enumerate(prompts):
            for number, chunk in enumerate(chunks):
                for token, positions in chunk.items():
                    rows.setdefault(token, []).extend(size + p for p in positions)
                    held.setdefault(token, []).append((b, number))
                size += length
        index = {token: torch.tensor(at, device=device) for token, at in rows.items()}
        self._scopes[component, True] = TokenRows(index, size)
        self._scopes[component, False] = PictureRows(held, len(prompts), self._routing)

    def _recognise(self, last_rows: Tensor) -> Iterator[Positions]:
        """The tokens of each of B prompts by their last rows (B, D'), both encoders' tokens joined."""
        parts = torch.split(last_rows, list(self.widths.values()), dim=1)
        names = [_names(part) for part in parts]
        blank = (last_rows == 0).all(dim=1).tolist()  # SDXL's empty negative prompt is all zeros
        for b in range(last_rows.shape[0]):
            found: dict[str, set[int]] = {}
            for component, name_list in zip(self.widths, names, strict=True):
                prompt = {} if blank[b] else self._known.get(component.encode() + name_list[b])
                if prompt is None:
                    raise GatingError(_strange(f"The embedding of prompt {b + 1} was not made by this {component}"))
                for token, positions in prompt.items():
                    found.setdefault(token, set()).update(positions)
            yield {token: tuple(sorted(positions)) for token, positions in found.items()}


def _forms(rows: Tensor) -> list[Tensor]:
    """(B, D) rows as they are, and as they will be if the pipeline casts them to half precision."""
    return [rows, rows.half(), rows.bfloat16()] if rows.dtype == torch.float32 else [rows]


def _names(rows: Tensor) -> list[bytes]:
    """The names of (B, D) rows; equal values have equal names in every dtype."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.float().cpu().contiguous().numpy()]


def _strange(what: str) -> str:
    return (
        f"{what} while a token-gated adapter was attached, so its gate cannot know where the tokens are. "
        "Encode prompts with this pipeline after attach(), or attach with gating='none'."
    )
