"""Captions as training uses them: the token in place of placeholders and trigger words, tags in a new order each time.

    rex, 1girl, smile, outdoors         a caption of tags, as kohya's scripts and WD14 taggers write them
    {token} or [trigger] on a beach     placeholders, which always mean the token

What a picture's caption is in a batch depends on the seed and on the batch's number alone, so that a resumed training
goes on with the same captions, and `fusion check` shows them.
"""

import random
import re
from itertools import dropwhile

from fusion.config import lower_tokens

PLACEHOLDERS = ("{token}", "[trigger]")  # in prompts and captions, both stand for the token
FixedTags = tuple[int, int]  # how many tags, at the beginning and at the end, keep their places in shuffled captions
_ARTICLES = ("a", "an", "the", "my", "one")


def with_token(text: str, token: str, trigger_word: str | None = None) -> str:
    """A prompt with every placeholder, and the trigger word where the token is missing, replaced by the token.

    The token itself is written in lower case.
    """
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, token)
    text = lower_tokens(text, (token,))
    if trigger_word and token not in text:
        text = _phrase(trigger_word).sub(token, text)
    return text


def caption_for(text: str, token: str, trigger: str = "", trigger_word: str | None = None) -> str:
    """A caption as training uses it: one line, the token in place of placeholders.

    `trigger_word` is the concept's name in these captions. `trigger` is its name in another trainer's folder, "sks
    dog": where the token is missing, the whole phrase becomes the token, or else its first word, if that stands there
    once. Articles before the name are no part of it.
    """
    text = with_token(" ".join(text.split()), token, trigger_word)
    words = list(dropwhile(lambda word: word.lower() in _ARTICLES, trigger.split()))
    for phrase in (" ".join(words), words[0]) if words else ():
        pattern = _phrase(phrase)
        if token not in text and (phrase == " ".join(words) or len(pattern.findall(text)) == 1):
            text = pattern.sub(token, text)
    return text


def split_caption(text: str, keep_tokens: int, separator: str | None) -> tuple[str, FixedTags]:
    """A caption without its separators, and its fixed tags: those before the first and behind the second separator.

    Without a separator the first `keep_tokens` tags are fixed. Kohya's scripts read captions in the same way.
    """
    if not separator or separator not in text:
        return text, (keep_tokens, 0)
    first, rest = text.split(separator, 1)
    rest, _, last = rest.partition(separator)
    parts = [_tags(part) for part in (first, rest, last)]
    return ", ".join(tag for part in parts for tag in part), (len(parts[0]), len(parts[2]))


def shuffle_tags(text: str, fixed: FixedTags, draw: random.Random) -> str:
    """A caption's tags in another order, but for the fixed ones."""
    tags = _tags(text)
    end = max(fixed[0], len(tags) - fixed[1])
    middle = tags[fixed[0] : end]
    return ", ".join([*tags[: fixed[0]], *draw.sample(middle, len(middle)), *tags[end:]])


def _phrase(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(' '.join(words.split()))}(?!\w)", re.IGNORECASE)


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]
