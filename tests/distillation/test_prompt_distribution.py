"""The prompts of a distillation: all kinds are among them, and equal seeds give equal ones."""

import random

import pytest

import tiny
from fusion.adapters.adapter import Concept
from fusion.distillation.config import SUBJECTS
from fusion.distillation.prompt_distribution import PromptDistribution, words_of

CONCEPTS = [Concept("<rex>", "unicorn"), Concept("<tom>", "volcano"), Concept("<ann>", "unicorn")]
TOKENS = [concept.token for concept in CONCEPTS]


def distribution(**options):
    words = words_of(tiny.tokenizer([*tiny.WORDS, "gargoyle"]))
    return PromptDistribution(CONCEPTS, words, ["<decoy-0>", "<decoy-1>"], **{"subjects": SUBJECTS, **options})


def count(prompt):
    return sum(token in prompt for token in TOKENS)


def test_words_are_the_tokenizers_whole_words_in_its_order():
    assert words_of(tiny.tokenizer())[:4] == ["photo", "picture", "of", "and"]


def test_prompts_have_all_kinds_of_contents():
    prompts = distribution().draw(random.Random(0), 4000)
    free = [prompt for prompt in prompts if not count(prompt)]
    assert len(free) / len(prompts) == pytest.approx(0.45, abs=0.03)
    assert free.count("") / len(free) == pytest.approx(0.1, abs=0.05)
    counts = [count(prompt) for prompt in prompts if count(prompt)]
    assert {*counts} == {1, 2, 3} and 0.5 < counts.count(1) / len(counts) < 0.8
    for word in (*TOKENS, "unicorn", "volcano", "gargoyle", "<decoy-1>", "on a red background", "on the left and"):
        assert sum(word in prompt for prompt in prompts) > 20, word
    assert sum(any(subject in prompt for subject in SUBJECTS) for prompt in free) > 200
    assert sum(prompt.startswith(tuple(TOKENS)) for prompt in prompts) > 20
    assert any(prompt.endswith("<rex>") for prompt in prompts)
    assert not any("{" in prompt for prompt in prompts)


def test_equal_seeds_give_equal_prompts_and_limits_hold():
    assert distribution().draw(random.Random(7), 50) == distribution().draw(random.Random(7), 50)
    assert distribution().draw(random.Random(7), 50) != distribution().draw(random.Random(8), 50)
    for limits in ((0, 0), (1, 1), (2, 3)):
        counts = {count(prompt) for prompt in distribution().draw(random.Random(0), 300, limits)}
        assert counts == {*range(limits[0], limits[1] + 1)}


def test_words_alone_need_no_grammar_and_ones_own_prompts_are_used():
    plain = distribution(use_templates=False).draw(random.Random(0), 500)
    known = {*words_of(tiny.tokenizer([*tiny.WORDS, "gargoyle"])), *TOKENS, "<decoy-0>", "<decoy-1>", "a"}
    assert {word for prompt in plain for word in prompt.split()} <= known
    own = distribution(captions=["{token} at sea", "an empty sea"]).draw(random.Random(0), 500)
    assert "<rex> at sea" in own and "an empty sea" in own
