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
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import initial_rows

_BOUND_TO = "bound_to"  # among the settings of an adapter's provenance: the word as it was given


def bind(pipe: Pipeline, adapter: Adapter, word: str) -> Adapter:
    """The adapter, gated by a token <alice>, or by a phrase of the prompt: "the knight".

    The token reads as the phrase itself, or as the word in its brackets, with the embeddings of these words in the base
    (`initial_rows`); an adapter that brings an embedding of its own keeps that. A phrase in a prompt is replaced by the
    token <the-knight> when it is drawn (`with_bound_words`). Raises ConfigError for a word without letters, or an
    adapter of several concepts.
    """
    token, concepts = token_of(word), adapter.info.concepts
    if len(concepts) > 1:
        raise ConfigError(f"'{adapter.info.name}' has {len(concepts)} concepts, which have their tokens already.")
    if concepts:
        bound = adapter.renamed({concepts[0].token: token})
    else:
        noun = " ".join(word.split()) if not TOKEN.fullmatch(word) else re.sub(r"[-_]+", " ", word.strip("<>"))
        tokenizers = [getattr(pipe, name) for name in TOKENIZERS.values() if getattr(pipe, name, None) is not None]
        pieces = max(len(tokenizer(noun, add_special_tokens=False).input_ids) for tokenizer in tokenizers)
        concept = Concept(token, noun, pieces)
        rows = {token: initial_rows(pipe, concept)}
        bound = replace(adapter, info=replace(adapter.info, concepts=(concept,)), tokens=rows)
    provenance = bound.info.provenance
    provenance = replace(provenance, settings={**provenance.settings, _BOUND_TO: word})
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


def bound_word(adapter: Adapter) -> str | None:
    """The word that an adapter was bound to, a token or a phrase."""
    word = adapter.info.provenance.settings.get(_BOUND_TO)
    return word if isinstance(word, str) else None


def with_bound_words(text: str, adapters: Iterable[Adapter]) -> str:
    """A prompt with the token in place of every phrase that an adapter is bound to, the longest first."""
    words = {word: a.info.concepts[0].token for a in adapters if (word := bound_word(a)) and a.info.concepts}
    for word in sorted((word for word in words if not TOKEN.fullmatch(word)), key=len, reverse=True):
        phrase = r"\s+".join(map(re.escape, word.split()))
        text = re.sub(rf"(?<![\w<-]){phrase}(?![\w>-])", words[word], text, flags=re.IGNORECASE)
    return text


def acts_on_pictures(adapter: Adapter) -> bool:
    """Whether a bound adapter changes layers that see no tokens."""
    return bound_word(adapter) is not None and not all(map(sees_tokens, adapter.layer_names))
