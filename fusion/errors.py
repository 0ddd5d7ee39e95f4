"""Everything that can go wrong by a user's hand: one kind each, one or two sentences, no traceback."""

import difflib
import re
from collections.abc import Iterable

_MAX_WORD, _MAX_TEXT = 300, 2400  # letters of a message: files have names, keys and captions of any length


class FusionError(Exception):
    """Base of all errors a user can cause; its text says what, which one, the numbers, and what to do next.

    What is quoted from files may be very long: of words, and of the whole text, the middle is left out.
    """

    def __init__(self, text: str = "") -> None:
        words = re.sub(rf"\S{{{_MAX_WORD},}}", lambda match: _without_middle(match[0], _MAX_WORD), str(text))
        super().__init__(_without_middle(words, _MAX_TEXT))


class ConfigError(FusionError):
    """A setting is unknown, of the wrong kind, or contradicts another."""


class DatasetError(FusionError):
    """A picture, caption or mask cannot be used."""


class FormatError(FusionError):
    """A file is not what it claims to be, or is incomplete."""


class OutputError(FormatError):
    """An output cannot be written, or would replace what somebody else has made."""


class OutOfMemory(FusionError):
    """The memory of the machine or of its GPU does not suffice."""


class SliceConflict(FusionError):
    """Two adapters own the same singular directions, or a slice does not fit a weight."""


class BaseMismatch(FusionError):
    """An adapter belongs to another base model."""


class TokenConflict(FusionError):
    """Two concepts use one token, or a token cannot be used."""


class GatingError(FusionError):
    """A token gate cannot be honoured here."""


class UnknownName(FusionError):
    """A name that is in none of our tables."""


def _without_middle(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[3 - limit // 2 :]}"


def closest(word: str, options: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: `"; did you mean 'rank'?"`, or a full stop when nothing is near."""
    near = difflib.get_close_matches(word[:100], list(options), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else "."
