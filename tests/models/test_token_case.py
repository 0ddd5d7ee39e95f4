"""A concept's token is the same in capitals."""

import pytest
import torch

import fusion
from fusion.adapters.adapter import Concept
from fusion.generation.config import GenerationConfig, Region
from trained import attached, draw, trained_adapter

REX = [Concept("<rex>", "dog", 3)]


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
