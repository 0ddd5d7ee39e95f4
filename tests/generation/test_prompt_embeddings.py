"""Prompts longer than the text encoders read, and weights of words: right values, and exact under gates."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fusion
import tiny
from fusion.errors import TokenConflict
from fusion.generation.config import GenerationConfig, Region
from fusion.generation.prompt_embeddings import embed_prompts
from fusion.generation.regions import Cover
from fusion.models.denoising import encode_prompts
from fusion.models.model_state import state_of
from fusion.models.prompt_chunks import split_prompt
from trained import attached, everywhere, trained_adapter

LONG = "a dog and a cat in the snow beside a bird and a robot and a photo of the <rex>, a picture of a dog"
LIMIT = {"sd1": 14, "sd2": 18, "sdxl": 14}


def draw(pipe, prompt, adapters=(), **settings):
    config = GenerationConfig.model_validate({"prompt": prompt, "num_inference_steps": 1, **settings})
    return np.stack([np.asarray(picture.image) for picture in fusion.generate(pipe, config, adapters)])


def texts(pipe, prompt, weighting="none"):
    return [chunk.text for chunk in split_prompt(pipe, prompt, weighting)]


def test_a_short_prompt_without_weights_is_drawn_as_the_pipeline_draws_it(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"num_inference_steps": 1, "guidance_scale": 7.5, "generator": generators, "output_type": "np"}
    for negative in ("", "a cat"):
        expected = pipe(["a dog, there"] * 2, negative_prompt=[negative] * 2 if negative else None, **options).images
        for weighting in ("none", "a1111", "compel"):
            drawn = draw(pipe, "a dog, there", negative_prompt=negative, num_images=2, prompt_weighting=weighting)
            assert np.array_equal(drawn, (expected * 255).round().astype("uint8"))
        for generator, seed in zip(generators, (0, 1), strict=True):
            generator.manual_seed(seed)


def test_chunks_are_whole_words_and_end_after_commas(family):
    pipe, limit = tiny.pipeline(family), LIMIT[family]
    assert texts(pipe, " ".join(["dog"] * limit)) == [" ".join(["dog"] * limit)]
    assert [text.split() for text in texts(pipe, " ".join(["dog"] * (2 * limit + 1)))] == [
        ["dog"] * limit, ["dog"] * limit, ["dog"],
    ]  # fmt: skip
    assert texts(pipe, " ".join(["dog"] * (limit - 3)) + ", a cat in the snow")[1] == "a cat in the snow"
    assert texts(pipe, "a dog BREAK a cat", "a1111") == ["a dog", "a cat"]
    assert len(texts(pipe, "a dog BREAK a cat")) == 1
    assert "".join(texts(pipe, "x" * 100)) == "x" * 100
    weighted = split_prompt(pipe, "dog " * (limit - 1) + "(cat bird:1.5)", "a1111")
    assert [[weight for _, weight in chunk.parts] for chunk in weighted] == [[1, 1.5], [1.5]]


def test_vectors_of_a_concept_stay_in_one_chunk():
    pipe = tiny.pipeline("sd1")
    with attached(pipe, trained_adapter(pipe, vectors=3)):
        dogs = " ".join(["dog"] * 12)
        assert [text.strip() for text in texts(pipe, f"{dogs} <rex>, cat")] == [dogs, "<rex>, cat"]
    with attached(pipe, trained_adapter(pipe, vectors=15)), pytest.raises(TokenConflict, match="takes 15 tokens"):
        split_prompt(pipe, "a <rex>")


def test_long_prompts_are_the_chunks_encodings_side_by_side(pipe, family):
    """Against the text encoders, called with ids cut by hand."""
    limit = LIMIT[family]
    words = [("dog", "cat", "bird", "a")[i % 4] for i in range(limit + 5)]
    with torch.no_grad():
        long, pooled = encode_prompts(pipe, [" ".join(words), "a dog"])
        expected = []
        for suffix in ("", "_2") if family == "sdxl" else ("",):
            tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
            cut = [" ".join(words[:limit]), " ".join(words[limit:]), "a dog", ""]
            ids = tokenizer(cut, padding="max_length", max_length=limit + 2, return_tensors="pt").input_ids
            output = encoder(ids, output_hidden_states=True)
            expected.append(output.hidden_states[-2] if family == "sdxl" else output[0])
    expected = torch.cat(expected, dim=-1)
    assert torch.equal(long, torch.stack([expected[:2].flatten(0, 1), expected[2:].flatten(0, 1)]))
    if family == "sdxl":
        assert torch.equal(pooled, output[0][[0, 2]])


@pytest.mark.parametrize("weighting", ["a1111", "compel"])
def test_weights_scale_the_rows_of_their_words(pipe, family, weighting):
    prompt = {"a1111": "a (dog:1.5) and [a cat]", "compel": "a (dog)1.5 and (a cat)0.9090909090909091"}[weighting]
    factors = torch.ones(LIMIT[family] + 2, 1)
    factors[2], factors[4:6] = 1.5, 1 / 1.1
    with torch.no_grad():
        weighted = encode_prompts(pipe, [prompt], weighting=weighting).states[0]
        plain, blank = (states for states in encode_prompts(pipe, ["a dog and a cat", ""]).states)
    widths = [32, 40] if family == "sdxl" else [weighted.shape[1]]
    for new, rows, empty in zip(*(tensor.split(widths, dim=1) for tensor in (weighted, plain, blank)), strict=True):
        expected = rows * factors
        expected = expected * (rows.mean() / expected.mean())
        if weighting == "compel":
            expected = empty + (rows - empty) * factors
        assert torch.allclose(new, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "dtype"), [("sd1", torch.float32), ("sd2", torch.bfloat16), ("sdxl", torch.float32)]
)
def test_gates_are_exact_in_long_and_weighted_prompts(pipe, dtype):
    pipe = pipe.to(dtype)
    rex, tom = trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)
    prompt = f"{LONG}, (a cat:1.4)"
    settings = {"prompt_weighting": "a1111", "negative_prompt": "(snow:1.2)"}
    with attached(pipe, rex, tom):
        embeds = embed_prompts(pipe, GenerationConfig(prompt=prompt, **settings))["prompt_embeds"]
        state = state_of(pipe)
        state.start_unet(embeds)
        chunks = split_prompt(pipe, prompt, "a1111")
        ids = pipe.tokenizer([chunk.text for chunk in chunks], padding="max_length", return_tensors="pt").input_ids
        number = pipe.tokenizer.convert_tokens_to_ids("<rex>")
        positions = (ids.flatten() == number).nonzero()[:, 0].tolist()
        assert len(chunks) > 1 and len(positions) == 1
        assert state.tracker.rows("unet", True).rows["<rex>"].tolist() == positions
    alone, without = draw(pipe, prompt, [rex], **settings), prompt.replace("<rex>", "dog")
    assert np.array_equal(draw(pipe, prompt, [rex, tom], **settings), alone)
    assert not np.array_equal(draw(pipe, prompt, [replace(rex, branches=())], **settings), alone)
    assert np.array_equal(draw(pipe, without, [rex, tom], **settings), draw(pipe, without, **settings))


def test_regions_follow_prompts_of_several_chunks():
    """A concept named in a region's second chunk acts in that region alone, also in layers that see no tokens."""
    pipe = tiny.pipeline("sd1")
    rex = trained_adapter(pipe, "<rex>", targets=[name for name in everywhere(pipe) if ".ff." in name])
    regions = (Region(LONG, (0, 0, 0.5, 1)), Region("a dog", (0.5, 0, 1, 1)))
    with attached(pipe, rex):
        embeds = embed_prompts(pipe, GenerationConfig(prompt="a cat", regions=regions))["prompt_embeds"]
        state = state_of(pipe)
        state.tracker.set_regions(Cover(regions, 8, 8))
        state.start_unet(embeds)
        rows = state.tracker.rows("unet", False).matching(("<rex>",), torch.zeros(1, 64, 32))
        state.tracker.set_regions(None)
    assert rows.tolist() == [cell for cell in range(64) if cell % 8 < 4]


def test_what_is_not_understood_is_named(caplog):
    pipe = tiny.pipeline("sd1")
    draw(pipe, "a dog [a|b] <hypernet:x:1>", prompt_weighting="a1111")
    assert "[a|b], <hypernet:x:1>" in caplog.text
    caplog.clear()
    draw(pipe, "a dog [a|b]")
    assert not caplog.records
