"""The prompts of a distillation, drawn from a distribution that needs nothing but the base's tokenizer.

Words of the tokenizer in any order, sentences from templates, captions, and prompts of the user's own; concepts stand
anywhere in them, some prompts hold none, and some are empty. In sentences, a thing is a subject that the base knows, a
concept's noun, any word, or a decoy: an unknown word in the place of other people's concepts.

Prompts are expanded and cut by the pipeline itself. A longer prompt that a program encodes in several chunks needs no
prompts of its own, since every chunk is encoded as a prompt is; nor do weights on words, which multiply rows of the
encoded prompt, and so its keys and values.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fusion.adapters.adapter import Concept

EMPTY_SHARE = 0.1  # of the prompts without concepts
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 20)  # words beside the concepts
COUNTS = (1, 1, 1, 1, 2, 2, 3)  # concepts in a prompt of words
SENTENCE_SHARE = 0.9
CAPTION_SHARE = 0.2  # of the prompts with one concept or none, where there are captions
WORD_SHARE = 0.1  # of the things in sentences that are no decoys: any word of the tokenizer
NOUN_SHARE = 0.15  # the concepts' own nouns; the rest are subjects
COLOURS = ["blue", "yellow", "white", "red", "pink", "green", "grey", "black", "brown", "orange", "purple", "teal"]
STYLE_SHARE = 0.5  # of the subjects in sentences, where there are styles
ALONE = (
    *("{a}", "{a}", "a photo of {a}", "a picture of {a}", "a close-up of {a}", "a painting of {a}", "{a} on the left"),
    *("{a} on the right", "{a} in the middle", "{bare}", "{bare}", "the {bare}", "two {bare}", "{a} in the snow"),
    *("{a} on a beach", "a {word} {bare}", "a {word} style {bare}", "{a}, {word}, {word}", "a photo of the {bare}"),
)
SEVERAL = (
    *("{a} on the left and {b} on the right", "{a} on the left and {b} on the right", "{a} above {b}", "{a} below {b}"),
    *("{a} and {b}", "{a} beside {b}", "{a} next to {b}", "{a} at the top and {b} at the bottom", "{a} with {b}"),
    *("{a}, {b} and {c}", "a photo of {a} and {b}", "{b} behind {a}", "{a} on the right and {b} on the left"),
)
BACKGROUNDS = ("", " on a {colour} background", " on a {colour} background", " on {colour}")


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...


def decoy_share(concepts: int) -> float:
    """The share of decoys among things: a file of one concept is the more likely to be used beside others."""
    return 0.15 if concepts > 1 else 0.3


def words_of(tokenizer: Tokenizer) -> list[str]:
    """The whole words of a CLIP vocabulary, in its own order: that of merging, so the frequent ones first."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [word.removesuffix("</w>") for word, _ in vocabulary if word.endswith("</w>")]
    return [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]


@dataclass(frozen=True)
class PromptDistribution:
    """Draws prompts; equal random states give equal prompts."""

    concepts: Sequence[Concept]
    words: Sequence[str]
    decoys: Sequence[str] = ()  # tokens
    captions: Sequence[str] = ()  # of the adapters and of the user; {token} is a concept
    subjects: Sequence[str] = ()
    styles: Sequence[str] = ()
    use_templates: bool = True
    free_share: float = 0.45
    decoy_share: float = 0.15  # of the things in sentences and of the prompts of words, where there are decoys

    def draw(self, rng: random.Random, count: int, tokens: tuple[int, int] | None = None) -> list[str]:
        """`count` prompts; with `tokens` only such as hold so many concepts, from the first number to the second."""
        return [self._prompt(rng, tokens) for _ in range(count)]

    def _prompt(self, rng: random.Random, limits: tuple[int, int] | None) -> str:
        free = limits[1] == 0 if limits else rng.random() < self.free_share
        if free and rng.random() < EMPTY_SHARE:
            return ""
        count = 0 if free else rng.choice(COUNTS)
        if limits:
            count = min(max(count, limits[0]), limits[1])
        tokens = rng.sample([concept.token for concept in self.concepts], min(count, len(self.concepts)))
        chance = rng.random()
        captions = [text for text in self.captions if ("{token}" in text) == bool(tokens)]
        if captions and len(tokens) < 2 and chance < CAPTION_SHARE:
            return rng.choice(captions).replace("{token}", "".join(tokens))
        sentence = self.use_templates and chance < SENTENCE_SHARE
        return self._sentence(rng, tokens) if sentence else self._words(rng, tokens)

    def _words(self, rng: random.Random, tokens: Sequence[str]) -> str:
        """Words in any order, the tokens anywhere among them."""
        words = [self._word(rng) for _ in range(rng.choice(LENGTHS))]
        for token in [*tokens, *self._some_decoys(rng)]:
            words.insert(rng.randint(0, len(words)), token)
        return " ".join(words)

    def _word(self, rng: random.Random) -> str:
        """Any word of the tokenizer."""
        return rng.choice(self.words) if self.words else "a"

    def _some_decoys(self, rng: random.Random) -> list[str]:
        if not self.decoys or rng.random() >= self.decoy_share:
            return []
        return rng.sample(self.decoys, min(len(self.decoys), rng.choice((1, 1, 2))))

    def _sentence(self, rng: random.Random, tokens: Sequence[str]) -> str:
        several = len(tokens) > 1 or rng.random() < 0.5
        template = rng.choice([t for t in (SEVERAL if several else ALONE) if len(tokens) < 3 or "{c}" in t])
        slots = [slot for slot in ("{a}", "{b}", "{c}", "{bare}") if slot in template]
        concepts = dict(zip(rng.sample(slots, min(len(tokens), len(slots))), tokens, strict=False))
        for slot in slots:
            thing = concepts.get(slot) or self._thing(rng)
            template = template.replace(slot, thing if slot == "{bare}" else f"{article(thing)} {thing}")
        while "{word}" in template:
            template = template.replace("{word}", self._word(rng), 1)
        return template + rng.choice(BACKGROUNDS).replace("{colour}", rng.choice(COLOURS))

    def _thing(self, rng: random.Random) -> str:
        if self.decoys and rng.random() < self.decoy_share:
            return rng.choice(self.decoys)
        nouns = [concept.noun for concept in self.concepts if concept.noun]
        kind = rng.random()
        if kind < WORD_SHARE or not self.subjects:
            return self._word(rng)
        noun = rng.choice(nouns if nouns and kind < WORD_SHARE + NOUN_SHARE else self.subjects)
        return f"{rng.choice(self.styles)} style {noun}" if self.styles and rng.random() < STYLE_SHARE else noun


def article(thing: str) -> str:
    return "an" if thing[:1] in "aeiou" else "a"
