"""A word for an adapter that acts everywhere, such as another program's LoRA: bound to it, it acts at the word.

In layers that are fed by the prompt (text encoders, keys and values of cross-attention) it acts at the word's positions
alone. Other layers see no tokens: there it acts on the whole picture where it is the only one, else in its region. So a
prompt without the word is drawn bit for bit as by the base. A prompt with the word is not drawn as by the LoRA alone:
what the LoRA did at the other words of the prompt is left out.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from fusion.adapters.adapter import Adapter, Concept, DigestCache
from fusion.config import TOKEN
from fusion.errors import ConfigError
from fusion.layer_names import TOKENIZERS, sees_tokens
from fusion.models.base_check import check_base
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import initial_rows

BOUND_TO = "bound_to"  # setting of a provenance: for each concept the word as the user gave it, "" for none


def bind(pipe: Pipeline, adapter: Adapter, word: str) -> Adapter:
    """The adapter, gated by a token <alice>, or by a phrase of the prompt: "the knight".

    The token reads as the phrase itself, or as the word in its brackets, with the embeddings of these words in the base
    (`initial_rows`); an adapter that brings an embedding of its own keeps that. A phrase in a prompt is replaced by the
    token <the-knight> when it is drawn (`with_bound_words`). Raises ConfigError for a word without letters, or an
    adapter of several concepts; BaseMismatch for one of another base.
    """
    word = " ".join(word.split())
    token, concepts = token_of(word), adapter.info.concepts
    if len(concepts) > 1:
        raise ConfigError(f"'{adapter.info.name}' has {len(concepts)} concepts, which have their tokens already.")
    check_base(pipe, adapter)
    if concepts:
        bound = adapter.renamed({concepts[0].token: token})
    else:
        noun = word if not TOKEN.fullmatch(word) else re.sub(r"[-_]+", " ", word.strip("<>"))
        tokenizers = [getattr(pipe, name) for name in TOKENIZERS.values() if getattr(pipe, name, None) is not None]
        pieces = max(len(tokenizer(noun, add_special_tokens=False).input_ids) for tokenizer in tokenizers)
        concept = Concept(token, noun, pieces)
        # Rounded, so that a file in half precision holds exactly these.
        rows = {token: {name: start.half().float() for name, start in initial_rows(pipe, concept).items()}}
        bound = replace(adapter, info=replace(adapter.info, concepts=(concept,)), tokens=rows)
    provenance = bound.info.provenance
    provenance = replace(provenance, settings={**provenance.settings, BOUND_TO: [word]})
    branches = tuple(replace(branch, gate=(token,)) for branch in bound.branches)
    info = replace(bound.info, provenance=provenance)
    return replace(bound, info=info, branches=branches, digest_cache=DigestCache())


def token_of(word: str) -> str:
    """The token of a word: <alice> as it is, "the knight" as <the-knight>. Raises ConfigError."""
    if TOKEN.fullmatch(word):
        return word
    letters = "-".join(re.findall(r"[a-z0-9]+", word.lower()))
    if not letters or set("<>") & set(word):
        raise ConfigError(f"'{word}' cannot bind an adapter: give a token such as <alice>, or words of the prompt.")
    return f"<{letters}>"


def bound_words(adapter: Adapter) -> dict[str, str]:
    """Token -> the word that it was bound to: a phrase of prompts, or the token itself."""
    words: object = adapter.info.provenance.settings.get(BOUND_TO)
    if not isinstance(words, list | tuple) or len(words) != len(adapter.info.concepts):
        return {}
    pairs = [(concept.token, word) for concept, word in zip(adapter.info.concepts, words, strict=True) if word]
    return {token: token if TOKEN.fullmatch(str(word)) else str(word) for token, word in pairs}


def joined_words(adapters: Iterable[Adapter]) -> dict[str, list[str]]:
    """The setting of an adapter that has the concepts of all of these; empty where none is bound."""
    tables = [(adapter, bound_words(adapter)) for adapter in adapters]
    words = [table.get(concept.token, "") for adapter, table in tables for concept in adapter.info.concepts]
    return {BOUND_TO: words} if any(words) else {}


def with_bound_words(text: str, adapters: Iterable[Adapter]) -> str:
    """A prompt with the token in place of every phrase that an adapter is bound to, the longest first."""
    tokens = {word: token for adapter in adapters for token, word in bound_words(adapter).items() if word != token}
    for word in sorted(tokens, key=len, reverse=True):
        phrase = r"\s+".join(map(re.escape, word.split()))
        text = re.sub(rf"(?<![\w<-]){phrase}(?![\w>-])", tokens[word], text, flags=re.IGNORECASE)
    return text


def bound_to_pictures(adapters: Iterable[Adapter], prompt: str) -> list[str]:
    """The bound tokens in a prompt whose branches change layers that see no tokens."""
    tokens = {
        token: None
        for adapter in adapters
        for branch in adapter.branches
        for token in branch.gate
        if token in bound_words(adapter) and token in prompt and not all(map(sees_tokens, branch.layers))
    }
    return list(tokens)


def unused_words(adapters: Iterable[Adapter], prompt: str) -> list[str]:
    """The bound words of adapters of which a prompt, with tokens in place of phrases, has none."""
    tables = [bound_words(adapter) for adapter in adapters]
    return [word for table in tables if not any(token in prompt for token in table) for word in table.values()]
