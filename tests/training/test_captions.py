"""Laws of captions of tags: what the token replaces, what keeps its place; batch k needs no batch before it."""

import random
from collections import Counter

import pytest
from toy_training import config

import tiny
from fusion.cli import main
from fusion.errors import DatasetError
from fusion.training.caption_text import shuffle_tags, split_caption, with_token
from fusion.training.dataset import instance_dataset
from fusion.training.training_data import TrainingData

TAGS = "rex, 1girl, smile, hat, outdoors, tree"
VARYING = {"trigger_word": "rex", "shuffle_caption": True, "keep_tokens": 1, "caption_dropout_rate": 0.3}


@pytest.fixture
def tagged(pictures):
    for i in range(3):
        (pictures / f"{i}.txt").write_text(TAGS)
    return pictures


@pytest.mark.parametrize(
    ("text", "word", "result"),
    [
        ("rex, 1girl", "rex", "<dog>, 1girl"),
        ("1girl, Rex \n sitting, t-rexes", "rex", "1girl, <dog> sitting, t-rexes"),
        ("rex (series), rex", "rex (series)", "<dog>, rex"),
        ("{token}, rex", "rex", "<dog>, rex"),  # a placeholder and the token come first
        ("<Dog>, rex", "rex", "<dog>, rex"),
        ("<sks> in snow", "<sks>", "<dog> in snow"),  # another program's token is a word like any other
        ("no trigger", "rex", "no trigger"),
    ],
)
def test_the_trigger_word_becomes_the_token_where_that_is_missing(text, word, result):
    assert with_token(" ".join(text.split()), "<dog>", word) == result


def test_captions_without_the_trigger_word_begin_with_the_token(tagged):
    (tagged / "1.txt").write_text("1girl, smile")
    dataset = instance_dataset(config(tagged, trigger_word="rex"))
    assert [e.caption for e in dataset.examples] == [f"<dog>{TAGS[3:]}", "<dog>, 1girl, smile", f"<dog>{TAGS[3:]}"]
    assert "Captions without the trigger word, which now begin with the token: 1.txt." in dataset.warnings
    with pytest.raises(DatasetError, match="set trigger_word"):
        instance_dataset(config(tagged))
    settings = config(tagged, trigger_word="sks", instance_prompt="photo of sks dog", validation_prompt="sks in snow")
    assert settings.validation_prompts() == ("<dog> in snow",)


def test_captions_of_another_ending(tagged):
    (tagged / "0.caption").write_text("<dog> asleep")
    (tagged / "1.caption").write_text("<dog> awake")
    for ending in (".caption", "caption"):
        dataset = instance_dataset(config(tagged, caption_extension=ending))
        assert [e.caption for e in dataset.examples] == ["<dog> asleep", "<dog> awake", "a <dog>"]
    assert "Not used: 0.txt, 1.txt, 2.txt." in dataset.warnings


@pytest.mark.parametrize(
    ("text", "fixed"), [("a, b ||| c, d ||| e", (2, 1)), ("a, b ||| c, d, e", (2, 0)), ("a, b, c, d, e", (1, 0))]
)
def test_tags_beside_separators_keep_their_places(text, fixed):
    clean, numbers = split_caption(text, 1, "|||")
    assert (clean, numbers) == ("a, b, c, d, e", fixed)
    orders = {shuffle_tags(clean, fixed, random.Random(seed)) for seed in range(300)}
    assert len(orders) == {(2, 1): 2, (2, 0): 6, (1, 0): 24}[fixed]
    for order in orders:
        tags = order.split(", ")
        assert sorted(tags) == [*"abcde"] and tags[: fixed[0]] == [*"abcde"][: fixed[0]]
        assert tags[5 - fixed[1] :] == [*"abcde"][5 - fixed[1] :]


def test_the_caption_of_a_use_is_a_function_of_seed_and_numbers(tagged):
    settings = config(tagged, **VARYING)
    example = instance_dataset(settings).examples[0]
    uses = [example.caption_in(settings, number, index) for number in range(100) for index in range(4)]
    assert uses == [example.caption_in(settings, number, index) for number in range(100) for index in range(4)]
    counts = Counter(uses)
    assert 80 < counts.pop("<dog>") < 160  # of 400, without a caption
    assert len(counts) > 80 and all(text.startswith("<dog>, ") and len(text) == len(example.caption) for text in counts)
    ungated = settings.updated({"gating": "none"})
    assert "" in {example.caption_in(ungated, number, 0) for number in range(20)}
    assert example.caption_in(config(tagged, trigger_word="rex"), 3, 0) == example.caption


def test_check_shows_the_captions_of_the_first_batches_as_train_uses_them(tagged, capsys):
    settings = config(tagged, **VARYING, train_batch_size=6)
    data = TrainingData(tiny.pipeline("sd1"), settings)
    data.prepare()
    flags = ["--trigger_word", "rex", "--shuffle_caption", "--keep_tokens", "1", "--caption_dropout_rate", "0.3"]
    assert main(["check", str(tagged), "--token", "<dog>", *flags]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for number in range(3):
        order = data.instances.order(6, settings.seed).batch(number)
        captions = data.batch(number, None).captions
        uses = [
            f'{data.instances.examples[i].image_path.name} "{text}"' for i, text in zip(order, captions, strict=True)
        ]
        assert f"batch {number + 1}: {'; '.join(uses)}" in printed
