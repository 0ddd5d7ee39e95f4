"""What the text encoders do not read is said, and a concept's token is never in it. Tokens have no case."""

import pytest
import torch

import fusion
import tiny
from fusion.adapters.adapter import Concept
from fusion.errors import TokenConflict
from fusion.generation.config import GenerationConfig, Region
from fusion.models.prompt_length import check_prompts
from trained import attached, draw, trained_adapter

LIMIT = 14  # of sd1: 16 positions, less those of start and end
REX = [Concept("<rex>", "dog", 3)]


def words(count: int) -> str:
    return " ".join(["dog"] * count)


def test_the_last_position_that_is_read_is_that_of_the_pipeline(pipe):
    """The token is accepted exactly where the gate opens for all its vectors."""
    limit = pipe.tokenizer.model_max_length - 2
    check_prompts(pipe, [f"{words(limit - 3)} <rex> {words(5)}"], REX)
    with pytest.raises(TokenConflict, match=rf"^<rex> takes positions {limit - 1} to {limit + 1} of .* reads {limit};"):
        check_prompts(pipe, [f"{words(limit - 2)} <rex>"], REX)
    adapter = trained_adapter(pipe, "<rex>", vectors=3)
    with attached(pipe, adapter):
        check_prompts(pipe, [f"{words(limit - 3)} <Rex>"], adapter.info.concepts)
        ids = pipe.tokenizer(f"{words(limit - 3)} <rex> <rex>_1 <rex>_2", truncation=True).input_ids
        assert len({*ids[1:-1]}) == 4 and len(ids) == limit + 2  # dog and three vectors


def test_what_is_cut_off_is_said_once(caplog):
    pipe = tiny.pipeline("sd1")
    check_prompts(pipe, [words(LIMIT), f"<rex> {words(LIMIT - 3)}"], REX)
    assert not caplog.records
    check_prompts(pipe, [f"<rex> {words(LIMIT - 4)} in the snow", words(20), words(20)], REX)
    (record,) = caplog.records
    assert record.getMessage().startswith("2 prompts are longer than the 14 tokens")
    assert record.getMessage().endswith("it does not read 'the snow'.")


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_token_is_the_same_in_capitals(pipe, vectors):
    adapter, plain = trained_adapter(pipe, "<rex>", vectors=vectors), draw(pipe, "a <Rex> and a <rex>")
    with attached(pipe, adapter):
        assert (
            pipe.tokenizer("a <ReX>").input_ids
            == pipe.tokenizer(" ".join(["a", *REX[0].pieces][: vectors + 1])).input_ids
        )
        low, mixed, high = (
            draw(pipe, text) for text in ("a <rex> and a <rex>", "a <Rex> and a <rex>", "a <REX> and a <reX>")
        )
    assert torch.equal(low, mixed) and torch.equal(low, high) and not torch.equal(low, plain)
    settings = GenerationConfig(prompt="a <Rex>", num_inference_steps=1, regions=(Region("<REX>", (0, 0, 0.5, 1)),))
    recipe = fusion.generate(pipe, settings, [adapter])[0].recipe
    assert recipe.config.prompt == recipe.config.regions[0].prompt == "a <rex>"
