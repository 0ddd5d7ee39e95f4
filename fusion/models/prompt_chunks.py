"""Prompts of any length, as chunks that a text encoder can read, and the weights of their words.

A chunk is encoded alone, in as many positions as the encoders have, and the chunks' rows are joined: so do A1111 and
Forge. It ends after a whole word, after a comma where one is near, and BREAK begins a new one. All of it is exact under
gates, since these recognise every chunk by its last row.

Shapes: T text positions, D embedding width.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusion.errors import ConfigError, TokenConflict
from fusion.layer_names import TOKENIZERS
from fusion.models.model_state import attached_state
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import embedding_of, text_encoders
from fusion.prompt_syntax import PromptPart, PromptWeighting, parse_prompt

_COMMA_REACH = 20  # tokens from the end of a full chunk in which it may end after a comma instead, as in A1111
# A word with the space behind it; a concept's token is a word, whatever it is beside.
_WORD = re.compile(r"<[\w-]+>\s*|(?:(?!<[\w-]+>)\S)+\s*")


@dataclass(frozen=True)
class Chunk:
    """What one pass of a text encoder reads."""

    parts: tuple[PromptPart, ...]

    @property
    def text(self) -> str:
        """A space between parts changes no token: a word that is weighted in part is two words."""
        return " ".join(part.text for part in self.parts)

    @property
    def weighted(self) -> bool:
        return any(part.weight != 1 for part in self.parts)


EMPTY = Chunk((PromptPart(""),))


def split_prompt(pipe: Pipeline, prompt: str, weighting: PromptWeighting = "none") -> list[Chunk]:
    """The chunks of a prompt, at least one; a prompt that fits into one and has no weights is left as it is.

    Concepts count by their vectors where they are attached. Raises TokenConflict for one that fits into no chunk.
    """
    counts = _counters(pipe)
    limit = min(room for _, room in counts)

    def count(text: str) -> int:
        return max(counter(text) for counter, _ in counts)

    chunks: list[Chunk] = []
    for section in parse_prompt(prompt, weighting):
        whole = Chunk(tuple(section))
        chunks += [whole] if sum(count(text) for text, _ in section) <= limit else _filled(section, limit, count)
    return chunks


def check_writes_vectors(pipe: Pipeline) -> None:
    """Raise ConfigError for a pipeline whose prompts have only the first vector of a concept (T2I-Adapters of SD 1)."""
    if not hasattr(pipe, "maybe_convert_prompt"):
        raise ConfigError(
            f"{type(pipe).__name__} reads only the first vector of a concept. Use a StableDiffusionPipeline of its "
            "components to train, to measure, or to attach concepts of several vectors and encode their prompts."
        )


def count_chunks(pipe: Pipeline, prompts: Iterable[str], weighting: PromptWeighting = "none") -> int:
    """The chunks of the longest of several prompts; the others are padded to it where they are encoded together."""
    return max((len(split_prompt(pipe, prompt, weighting)) for prompt in dict.fromkeys(prompts)), default=1)


def _counters(pipe: Pipeline) -> list[tuple[Callable[[str], int], int]]:
    """For each text encoder: what counts the tokens of a text, and how many it reads."""
    counters: list[tuple[Callable[[str], int], int]] = []
    for component, encoder in text_encoders(pipe).items():
        tokenizer: Any = getattr(pipe, TOKENIZERS[component])
        config: Any = encoder.config
        room = min(tokenizer.model_max_length, config.max_position_embeddings) - tokenizer.num_special_tokens_to_add()
        counters.append((_counter(pipe, tokenizer), room))
    return counters


def _counter(pipe: Any, tokenizer: Any) -> Callable[[str], int]:
    check_writes_vectors(pipe)

    @cache
    def count(text: str) -> int:
        words = pipe.maybe_convert_prompt(text, tokenizer)  # every vector of a concept, as the pipeline writes them
        return len(tokenizer(words, add_special_tokens=False, verbose=False).input_ids)

    return count


def _filled(section: Sequence[PromptPart], limit: int, count: Callable[[str], int]) -> list[Chunk]:
    """A section in chunks of at most `limit` tokens."""
    words = [
        (PromptPart(piece, weight), count(piece))
        for text, weight in section
        for word in _WORD.findall(text)
        for piece in _pieces(word, limit, count)
    ]
    chunks, start = list[Chunk](), 0
    while start < len(words):
        end, total = start, 0
        while end < len(words) and total + words[end][1] <= limit:
            total += words[end][1]
            end += 1
        if end < len(words):
            end = _after_comma(words, start, end)
        chunks.append(Chunk(tuple(_merged([part for part, _ in words[start:end]]))))
        start = end
    return chunks


def _pieces(word: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """A word, or its halves where it does not fit into a chunk."""
    if (size := count(word)) <= limit:
        return [word]
    if re.match(r"<[\w-]+>", word) or len(word) < 2:
        raise TokenConflict(f"{word.strip()} takes {size} tokens, and a text encoder of this base reads {limit}.")
    middle = len(word) // 2
    return [*_pieces(word[:middle], limit, count), *_pieces(word[middle:], limit, count)]


def _after_comma(words: Sequence[tuple[PromptPart, int]], start: int, end: int) -> int:
    """Where a full chunk ends: after its last comma if that is near, else at `end`."""
    behind = 0
    for number in range(end - 1, start, -1):
        if words[number][0].text.rstrip().endswith(","):
            return number + 1
        behind += words[number][1]
        if behind > _COMMA_REACH:
            break
    return end


def _merged(words: Sequence[PromptPart]) -> list[PromptPart]:
    parts: list[PromptPart] = []
    for word in words:
        if parts and parts[-1].weight == word.weight:
            parts[-1] = PromptPart(parts[-1].text + word.text, word.weight)
        else:
            parts.append(word)
    return parts


def apply_weights(
    pipe: Pipeline, chunks: Sequence[Chunk], states: Tensor, weighting: PromptWeighting, empty: Callable[[], Tensor]
) -> Tensor:
    """The rows of encoded chunks, (chunks, T, D), by the weights of their words; chunks without any are left as is.

    a1111: rows times weights, then everything so that the mean of the chunk is what it was, for each text encoder, as
    A1111's and Forge's "Original". compel: the distance from the row of the empty prompt, `empty()` (1, T, D), times
    the weight; compel itself does other things where weights are below 1. Gates recognise the result.
    """
    encoders = text_encoders(pipe)
    counters = dict(zip(encoders, _counters(pipe), strict=True))
    widths = [embedding_of(encoder).embedding_dim for encoder in encoders.values()]
    rows = list(states)
    weighted = [number for number, chunk in enumerate(chunks) if chunk.weighted]
    blank = empty()[0] if weighted and weighting == "compel" else None
    for number in weighted:
        pieces: list[Tensor] = []
        split = torch.split(states[number].float(), widths, dim=-1)
        blanks = torch.split(blank.float(), widths, dim=-1) if blank is not None else [None] * len(widths)
        for component, part, blank_part in zip(encoders, split, blanks, strict=True):
            weights = _row_weights(chunks[number], counters[component][0], len(part)).to(part)
            pieces.append(_scaled(part, weights, blank_part))
        rows[number] = torch.cat(pieces, dim=-1).to(states.dtype)
    result = torch.stack(rows)
    if weighted and (state := attached_state(pipe)) is not None:
        state.tracker.remember_scaled(states[weighted, -1], result[weighted, -1])
    return result


def _row_weights(chunk: Chunk, count: Callable[[str], int], length: int) -> Tensor:
    """(T, 1); the positions of start, end and padding have weight 1."""
    weights = torch.ones(length, 1)
    position = 1
    for text, weight in chunk.parts:
        size = count(text)
        weights[position : position + size] = weight
        position += size
    return weights


def _scaled(rows: Tensor, weights: Tensor, blank: Tensor | None) -> Tensor:
    """(T, D) rows by (T, 1) weights."""
    if blank is not None:
        return torch.where(weights == 1, rows, blank + (rows - blank) * weights)
    scaled = rows * weights
    mean = scaled.mean()
    return scaled * (rows.mean() / mean) if mean else scaled
