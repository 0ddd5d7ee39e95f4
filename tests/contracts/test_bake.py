"""Baking is what attaching without gates does, for good (law 5)."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

import tiny
from fusion.adapters import ADAPTERS
from fusion.errors import BaseMismatch, FusionError, GatingError, TokenConflict
from fusion.layer_names import TOKENIZERS
from fusion.models.attachment import attach
from fusion.models.baking import bake
from fusion.models.layer_sites import components, sites
from fusion.models.tokens import embedding_of
from trained import attached, draw, everywhere, trained_adapter

PROMPTS = ["a dog", "a <rex> beside a cat"]


def weights(pipe):
    return {name: site.module.weight.clone() for name, site in sites(pipe).items()}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_baking_is_attaching_without_gates(kind, pipe):
    adapter = trained_adapter(pipe, kind=kind, vectors=2, targets=everywhere(pipe), scale=0.1)
    with attached(pipe, adapter, gating="none"):
        expected = draw(pipe, PROMPTS, num_inference_steps=1)
    bake(pipe, adapter, gating="none")
    found = draw(pipe, PROMPTS, num_inference_steps=1)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_strengths_and_several_branches_are_baked_too():
    pipe = tiny.pipeline("sd1")
    one, two = trained_adapter(pipe, "<a>", gated=False), trained_adapter(pipe, "<b>", k=1, kind="lora", gated=False)
    both = replace(
        one,
        info=replace(one.info, concepts=one.info.concepts + two.info.concepts),
        branches=(replace(one.branches[0], strength=0.5), replace(two.branches[0], strength=-1.5)),
        tokens={**one.tokens, **two.tokens},
    )
    with attached(pipe, both):
        expected = draw(pipe, "a <a> and a <b>")
    bake(pipe, both)
    assert (draw(pipe, "a <a> and a <b>") - expected).norm() < 1e-4 * expected.norm()


def test_a_baked_pipeline_survives_saving(tmp_path, pipe):
    before = torch.random.get_rng_state()
    bake(pipe, trained_adapter(pipe, gated=False, vectors=2), gating="none")
    picture = draw(pipe, PROMPTS)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    again = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, PROMPTS), picture)
    assert before.shape == torch.random.get_rng_state().shape


def test_baking_draws_no_random_numbers(pipe):
    adapter = trained_adapter(pipe, gated=False)
    before = torch.random.get_rng_state()
    bake(pipe, adapter)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_second_time_is_refused_and_another_adapter_is_not():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, gated=False, scale=0.01)
    bake(pipe, adapter)
    before = weights(pipe)
    with pytest.raises(FusionError, match=r"'rex' is baked into this pipeline already.*double"):
        bake(pipe, adapter)
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    with pytest.raises(FusionError, match="baked into this pipeline already"):
        bake(other, adapter)
    assert all(torch.equal(*pair) for pair in zip(before.values(), weights(pipe).values(), strict=True))
    bake(pipe, trained_adapter(pipe, "<other>", k=1, gated=False, scale=0.01))


def test_what_cannot_be_baked_is_refused_before_anything_changes(pipe):
    gated, plain = trained_adapter(pipe), trained_adapter(pipe, gated=False, vectors=2)
    misfit = replace(plain, tokens={"<rex>": {c: rows[:, 1:] for c, rows in plain.tokens["<rex>"].items()}})
    before, words = weights(pipe), len(pipe.tokenizer)
    with pytest.raises(GatingError, match=r"gated by <rex>.*gating='none'"):
        bake(pipe, gated)
    with pytest.raises(GatingError, match="gated by <rex>"):
        bake(pipe, plain, gating="tokens")
    with attach(pipe, gated), pytest.raises(FusionError, match="detach them before baking"):
        bake(pipe, plain)
    with pytest.raises(BaseMismatch, match="<rex> has an embedding of shape"):
        bake(pipe, misfit)
    last = list(components(pipe))[-1]
    getattr(pipe, TOKENIZERS[last]).add_tokens(["<rex>_1"])
    with pytest.raises(TokenConflict, match="<rex> is a word of this base's tokenizer"):
        bake(pipe, plain)
    assert all(torch.equal(*pair) for pair in zip(before.values(), weights(pipe).values(), strict=True))
    assert len(pipe.tokenizer) == words + (last == "text_encoder")
    assert embedding_of(pipe.text_encoder).num_embeddings == words


def test_a_vocabulary_with_room_to_spare_is_not_cut():
    pipe = tiny.pipeline("sd1")
    words = len(pipe.tokenizer)
    pipe.text_encoder.resize_token_embeddings(words + 5, mean_resizing=False)
    adapter = trained_adapter(pipe, gated=False, vectors=2)
    before = embedding_of(pipe.text_encoder).weight.clone()
    bake(pipe, adapter)
    after = embedding_of(pipe.text_encoder).weight
    assert after.shape == before.shape
    assert torch.equal(after[words : words + 2], adapter.tokens["<rex>"]["text_encoder"])
    assert torch.equal(after[:words], before[:words]) and torch.equal(after[words + 2 :], before[words + 2 :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(dtype):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, gated=False, targets=["unet.attn2", "unet.proj_in"])
    exact = {name: site.module.weight.to(dtype).float() for name, site in sites(pipe).items()}
    pipe.unet.to(dtype)
    bake(pipe, adapter)
    for name, delta in adapter.deltas().items():
        expected = (exact[name] + delta.dense().view_as(exact[name])).to(dtype)
        assert torch.equal(sites(pipe)[name].module.weight, expected)
