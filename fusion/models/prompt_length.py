"""How much of a prompt the text encoders read: as many tokens as they have positions, and nothing behind them."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from fusion.adapters.adapter import Concept
from fusion.errors import TokenConflict
from fusion.layer_names import TOKENIZERS
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import text_encoders

logger = logging.getLogger(__name__)

SHOWN = 80  # letters of a prompt in messages


def check_prompts(pipe: Pipeline, prompts: Iterable[str], concepts: Iterable[Concept]) -> None:
    """Warn, once for all prompts, of what the text encoders do not read.

    Raises TokenConflict for a concept's token that is behind their last position: it would do nothing. The concepts
    need not be attached.
    """
    unread: dict[str, tuple[str, int]] = {}  # prompt -> what is cut off, and the limit
    vectors = {concept.token: concept.vectors for concept in concepts}
    for component, encoder in text_encoders(pipe).items():
        tokenizer: Any = getattr(pipe, TOKENIZERS[component])
        config: Any = encoder.config
        limit = min(tokenizer.model_max_length, config.max_position_embeddings) - tokenizer.num_special_tokens_to_add()
        for prompt in dict.fromkeys(prompts):
            if (rest := _unread(prompt, vectors, tokenizer, limit)) and len(rest) > len(unread.get(prompt, ("", 0))[0]):
                unread[prompt] = rest, limit
    if unread:
        prompt, (rest, limit) = next(iter(unread.items()))
        many = f"{len(unread)} prompts are" if len(unread) > 1 else "A prompt is"
        logger.warning(
            "%s longer than the %d tokens that the text encoder reads; of '%s' it does not read '%s'.",
            many, limit, _short(prompt), _short(rest),
        )  # fmt: skip


def _unread(prompt: str, vectors: dict[str, int], tokenizer: Any, limit: int) -> str:
    """What of a prompt is behind position `limit`. Raises TokenConflict for a concept's token that is."""
    words = "|".join(map(re.escape, vectors)) or "(?!)"
    position, rest = 0, list[str]()
    for part in re.split(f"({words})", prompt, flags=re.IGNORECASE):
        if (token := part.lower()) in vectors:
            first, position = position + 1, position + vectors[token]
            if position > limit:
                at = f"position {first}" if first == position else f"positions {first} to {position}"
                raise TokenConflict(
                    f"{token} takes {at} of '{_short(prompt)}', and this base's text encoder reads {limit}; write it "
                    "earlier, or shorten the prompt."
                )
        else:
            ids = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
            if position + len(ids) > limit:
                rest.append(tokenizer.decode(ids[max(0, limit - position) :]))
            position += len(ids)
    return " ".join(rest).strip()


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
