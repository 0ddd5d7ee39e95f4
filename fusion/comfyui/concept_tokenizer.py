"""Concept tokens in ComfyUI's prompts: written as embeddings, which ComfyUI's own tokenizers read and weight.

A token `<dog>` becomes `embedding:<name>` before ComfyUI parses the prompt, so parentheses, weights and chunks are
ComfyUI's. The rows come back from its tokenizers as tensors, by whose content the text encoders' hooks know them.
"""

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion.adapters.adapter import Adapter
from fusion.models.binding import with_bound_words


def gate_key(adapter: Adapter, token: str) -> str:
    """The token with a digest of its embeddings: adapters of one token but other embeddings are other concepts."""
    sha = hashlib.blake2b(digest_size=6)
    for _, rows in sorted(adapter.tokens[token].items()):
        for row in rows:
            sha.update(content(row))
    return f"{token} {sha.hexdigest()}"


def content(row: Tensor) -> bytes:
    """An embedding (D,) as the text encoder is given it: equal values, equal bytes."""
    return row.detach().float().cpu().contiguous().numpy().tobytes()


class ConceptTokenizer:
    """ComfyUI's tokenizer, with concepts. All that it does not do itself is the original's."""

    def __init__(self, original: Any, names: Mapping[str, str], adapters: Sequence[Adapter], folder: Path) -> None:
        """`names`: component -> the attribute of `original` with that component's tokenizer.

        `folder`: where the concepts' embeddings are written for ComfyUI to read.
        """
        self.base = original
        self._original, self._adapters, self._folder = copy.copy(original), tuple(adapters), folder
        self._embeddings: dict[str, dict[str, Tensor]] = {}  # name of the embedding -> ComfyUI's key -> (vectors, D)
        self._words: dict[str, str] = {}  # token -> name of its embedding
        for attribute in names.values():
            part = copy.copy(getattr(original, attribute))
            paths = part.embedding_directory or []
            part.embedding_directory = [str(folder), *([paths] if isinstance(paths, str) else paths)]
            setattr(self._original, attribute, part)
        for adapter in adapters:
            for token, rows in adapter.tokens.items():
                name = self._words[token] = "spectral-" + gate_key(adapter, token).rpartition(" ")[2]
                self._embeddings[name] = {
                    getattr(original, names[component]).embedding_key: row.detach().float().cpu().contiguous()
                    for component, row in rows.items()
                    if component in names
                }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy is asked for these before it has an original
            raise AttributeError(name)
        return getattr(self._original, name)

    def without_phrases(self) -> "ConceptTokenizer":
        """A tokenizer that knows the tokens alone: phrases that adapters are bound to are words as any other."""
        tokenizer = copy.copy(self)
        tokenizer._adapters = ()
        return tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, Any]:
        """What ComfyUI's tokenizer returns: for each text encoder its chunks of (token or embedding, weight)."""
        return self._original.tokenize_with_weights(self.with_embeddings(text), return_word_ids, **options)

    def with_embeddings(self, text: str) -> str:
        """The prompt with the names of embeddings in place of tokens, and of phrases that adapters are bound to."""

        def embedding(match: re.Match[str]) -> str:
            if (name := self._words.get(match[0].lower())) is None:
                return match[0]
            self._write(name)
            return f" embedding:{name} "

        return re.sub(r"<[\w-]+>", embedding, with_bound_words(text, self._adapters))

    def _write(self, name: str) -> None:
        path = self._folder / f"{name}.safetensors"
        if not path.exists():  # ComfyUI empties its temporary folder when it starts
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(self._embeddings[name], path)


def positions(tokens: Sequence[Any], words: Mapping[bytes, str], width: int) -> dict[str, tuple[int, ...]]:
    """Gate key -> positions in one chunk of ComfyUI's tokens; `words`: content of a row -> its gate key.

    An embedding of another width than the text encoder's takes no position: ComfyUI leaves it out.
    """
    numbers: dict[str, list[int]] = {}
    position = 0
    for token in tokens:
        if isinstance(token, Tensor):
            if token.shape[-1] != width:
                continue
            if (key := words.get(content(token))) is not None:
                numbers.setdefault(key, []).append(position)
        position += 1
    return {key: tuple(values) for key, values in numbers.items()}


def rows_of(adapters: Sequence[Adapter], component: str) -> dict[bytes, str]:
    """Content of every row of the concepts in one text encoder -> gate key."""
    return {
        content(row): gate_key(adapter, token)
        for adapter in adapters
        for token, rows in adapter.tokens.items()
        for row in rows.get(component, torch.empty(0))
    }
