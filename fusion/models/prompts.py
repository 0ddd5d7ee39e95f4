"""Where concept tokens stand in the prompts that flow through a pipeline.

Pipelines repeat, concatenate and reorder prompt embeddings before the UNet sees them (guidance, batches, negative
prompts, several images per prompt, SDXL's two encoders side by side). So the UNet's prompts are recognised by content:
attention in CLIP is causal, hence the last row of an encoded prompt depends on every token of it and serves as its
name.

Shapes: B prompts, T text positions, D embedding width.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion.errors import GatingError

_REMEMBERED = 16384  # names kept, oldest dropped first: about 2 MB

Positions = Mapping[str, tuple[int, ...]]  # token -> positions in one prompt, ascending


@dataclass
class Scope:
    """Flattened rows of the current call, token by token; a branch asks for the rows of its gate."""

    rows: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # token -> (n,) ascending
    size: int = 0  # rows in all, to catch a layer whose input is not what the gate was read from
    _joined: dict[tuple[str, ...], Tensor | None] = field(default_factory=dict[tuple[str, ...], "Tensor | None"])

    def open_rows(self, gate: tuple[str, ...]) -> Tensor | None:
        """The rows at which any token of `gate` stands, or None: the gate is shut and costs no arithmetic."""
        if gate not in self._joined:
            present = [self.rows[token] for token in gate if token in self.rows]
            self._joined[gate] = torch.cat(present).unique() if present else None
        return self._joined[gate]


class PromptReader:
    """Remembers encoded prompts, and tells text encoder and UNet layers which rows belong to which token."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        """`widths`: text encoder component -> D, in the order in which the UNet's prompt embedding joins them."""
        self.widths = dict(widths)
        self.text = {component: Scope() for component in widths}
        self.unet_tokens, self.unet_pictures = Scope(), Scope()
        self._known: OrderedDict[bytes, Positions] = OrderedDict()
        self._length = 0  # T of the prompts remembered last
        self._last: tuple[Tensor, int] | None = None

    def scope(self, component: str, sees_tokens: bool) -> Scope:
        """The scope the gates of a component's layers read. Scopes are replaced at every call, so ask each time.

        Layers that see no tokens are gated picture by picture: open where the prompt holds the token at all.
        """
        if component in self.text:
            return self.text[component]
        return self.unet_tokens if sees_tokens else self.unet_pictures

    def begin_text(self, component: str, prompts: Sequence[Positions], length: int, device: torch.device) -> None:
        """A text encoder starts on B prompts of T positions."""
        rows = {
            token: torch.tensor(
                [b * length + p for b, prompt in enumerate(prompts) for p in prompt.get(token, ())],
                device=device,
            )
            for token in dict.fromkeys(token for prompt in prompts for token in prompt)
        }
        self.text[component] = Scope(rows, len(prompts) * length)
        self._length = length

    def end_text(self, component: str, prompts: Sequence[Positions], last_rows: Tensor) -> None:
        """Remember what B prompts were encoded to; `last_rows` (L, B, D): the last position of L candidate layers."""
        for layer in last_rows.detach():
            for name_list in _names(layer):
                for name, prompt in zip(name_list, prompts, strict=True):
                    self._known[component.encode() + name] = prompt
                    self._known.move_to_end(component.encode() + name)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def begin_unet(self, embeds: Tensor) -> None:
        """The UNet starts on prompt embeddings (B, T', D'), T' a multiple of T for prompts encoded in chunks.

        Raises GatingError for embeddings this pipeline's text encoders did not make.
        """
        version = 0 if embeds.is_inference() else embeds._version
        if self._last is not None and self._last[0] is embeds and self._last[1] == version:
            return
        chunks, rest = divmod(embeds.shape[1], max(self._length, 1))
        if rest or embeds.shape[2] != sum(self.widths.values()):
            raise GatingError(
                _strange(f"Prompt embeddings of shape {tuple(embeds.shape)} do not fit the text encoders")
            )
        at: dict[str, list[int]] = {}
        pictures: dict[str, list[int]] = {}
        for c in range(chunks):
            end = (c + 1) * self._length - 1
            for b, prompt in enumerate(self._recognise(embeds[:, end].detach())):
                for token, positions in prompt.items():
                    offset = b * embeds.shape[1] + c * self._length
                    at.setdefault(token, []).extend(offset + p for p in positions)
                    pictures.setdefault(token, []).append(b)
        self.unet_tokens = Scope(
            {token: torch.tensor(sorted(set(rows)), device=embeds.device) for token, rows in at.items()},
            embeds.shape[0] * embeds.shape[1],
        )
        self.unet_pictures = Scope(
            {token: torch.tensor(sorted(set(rows)), device=embeds.device) for token, rows in pictures.items()},
            embeds.shape[0],
        )
        self._last = (embeds, version)

    def _recognise(self, last_rows: Tensor) -> Iterator[Positions]:
        """The tokens of each of B prompts by their last rows (B, D'), both encoders' tokens joined."""
        parts = torch.split(last_rows, list(self.widths.values()), dim=1)
        names = [_names(part)[0] for part in parts]
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


def _names(rows: Tensor) -> list[list[bytes]]:
    """Names of (B, D) rows as they are, and as they will be if the pipeline casts them to half precision."""
    forms = [rows.float()]
    if rows.dtype == torch.float32:
        forms += [rows.half().float(), rows.bfloat16().float()]
    return [
        [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in form.cpu().contiguous().numpy()]
        for form in forms
    ]


def _strange(what: str) -> str:
    return (
        f"{what} while a token-gated adapter was attached, so its gate cannot know where the tokens are. "
        "Encode prompts with this pipeline after attach(), or attach with gating='none'."
    )
