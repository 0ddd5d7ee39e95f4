"""A token-gated adapter changes no bit of a prompt without its tokens (law 19), through the ordinary pipeline call."""

import random
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

import tiny
from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter
from fusion.composition.fusing import fuse
from fusion.errors import GatingError
from fusion.models.attachment import attach
from fusion.models.layer_sites import components, sites
from trained import attached, draw, everywhere, trained_adapter

LONG = "a photo of " + "the snow and " * 20
# Every way to call a pipeline: (prompt, options), `{}` standing for the subject.
CALLS = {
    "guided": ("a photo of {}", {}),
    "unguided": ("a photo of {}", {"guidance_scale": 1.0}),
    "negative": ("a photo of {}", {"negative_prompt": "a cat"}),
    "in the negative": ("a photo of a bird", {"negative_prompt": "a {}"}),
    "several each": ("a {} in the snow", {"num_images_per_prompt": 3}),
    "batch": (["a cat", "a photo of {}", "{} beside a {}"], {}),
    "mixed negatives": (["{}", "a cat"], {"negative_prompt": ["a bird", "a {}"], "num_images_per_prompt": 2}),
    "truncated": ("{} " + LONG, {}),
    "nothing": ("", {"negative_prompt": "{}"}),
}
every_call = pytest.mark.parametrize("call", CALLS)


def called(pipe, call, subject):
    prompt, options = CALLS[call]

    def filled(text):
        return text.format(*[subject] * 3) if isinstance(text, str) else [filled(t) for t in text]

    negative = {k: filled(v) for k, v in options.items() if k == "negative_prompt"}
    return draw(pipe, filled(prompt), num_inference_steps=1, **options | negative)


class Crowd(NamedTuple):
    bare: Any  # a pipeline without adapters
    full: Any  # its twin with ten attached, of all types and on all sorts of targets
    adapters: list[Adapter]


@pytest.fixture(scope="module")
def crowds():
    return {family: _crowd(family) for family in tiny.FAMILIES}


def _crowd(family):
    bare, full, kinds = tiny.pipeline(family), tiny.pipeline(family), list(ADAPTERS)
    targets = [None, ["text_encoder", "unet.attn2"], everywhere(bare), ["unet.attn1", "unet.ff", "unet.proj_in"]]
    adapters = [
        trained_adapter(
            bare, f"<c{i}>", kind=kinds[i % 7], k=i, rank=2, vectors=1 + i % 3, targets=targets[i % 4], scale=0.2
        )
        for i in range(10)
    ]
    for adapter in random.Random(family).sample(adapters, 10):
        attach(full, adapter)
    return Crowd(bare, full, adapters)


@pytest.fixture
def crowd(crowds, family):
    return crowds[family]


@every_call
def test_a_prompt_without_tokens_is_the_base(call, crowd):
    assert torch.equal(called(crowd.full, call, "a dog"), called(crowd.bare, call, "a dog"))


@every_call
@pytest.mark.parametrize("one", [0, 2, 3])
def test_a_prompt_with_one_token_is_that_adapter_alone(call, one, crowd):
    with attached(crowd.bare, crowd.adapters[one]):
        alone = called(crowd.bare, call, f"<c{one}>")
    assert torch.equal(called(crowd.full, call, f"<c{one}>"), alone)
    assert not torch.allclose(called(crowd.bare, call, "a dog"), alone, atol=1e-4)


def test_several_concepts_in_one_prompt_need_only_theirs(crowd):
    prompts = ["a <c1> beside a <c6>", "<c6>", "a dog"]
    for order in ((1, 6), (6, 1)):
        with attached(crowd.bare, *(crowd.adapters[i] for i in order)):
            two = draw(crowd.bare, prompts)
        assert torch.equal(draw(crowd.full, prompts), two)
    with attached(crowd.bare, replace(crowd.adapters[1], branches=()), crowd.adapters[6]):
        assert not torch.allclose(draw(crowd.bare, prompts)[0], two[0], atol=1e-4)


def test_neighbours_in_a_batch_do_not_touch_each_other(crowd):
    base = draw(crowd.bare, ["a dog", "a cat", "a bird"])
    mixed = draw(crowd.full, ["a dog", "a <c2>", "a bird <c3> <c1>"])
    assert torch.equal(mixed[0], base[0])


def test_a_fused_adapter_is_its_parts_attached(crowd):
    prompts = ["a <c1> beside a <c6>", "<c2>", "a dog"]
    with attached(crowd.bare, fuse(crowd.adapters)):
        assert torch.equal(draw(crowd.bare, prompts), draw(crowd.full, prompts))


def test_random_loading_orders_draw_the_same(crowd):
    prompts = ["a <c0> beside a <c9>", "<c5> and <c4> and <c2>"]
    expected = draw(crowd.full, prompts, num_inference_steps=1)
    for seed in range(2):
        with attached(crowd.bare, *random.Random(seed).sample(crowd.adapters, 10)):
            assert torch.equal(draw(crowd.bare, prompts, num_inference_steps=1), expected)


def test_upper_case_and_punctuation_are_forgiven(crowd):
    assert torch.equal(draw(crowd.full, "A <C0>, in the snow"), draw(crowd.full, "a <c0> , in the snow"))


def test_a_token_beyond_the_end_of_the_prompt_is_not_there(crowd):
    assert torch.equal(draw(crowd.full, f"{LONG} <c0>"), draw(crowd.bare, f"{LONG} dog"))


def embeddings(pipe, prompt, **options):
    """(B, T, D) and what else SDXL needs, as keywords of the pipeline call."""
    made = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **options
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: value.detach() for name, value in zip(names, made, strict=False)}


def test_embeddings_made_after_attaching_are_as_good_as_prompts(crowd):
    options = {"negative_prompt": "a <c3>"}
    expected = draw(crowd.full, "a <c2> and a dog", **options)
    assert torch.equal(draw(crowd.full, None, **embeddings(crowd.full, "a <c2> and a dog", **options)), expected)


def test_embeddings_made_before_attaching_are_refused_and_zeros_are_not(crowd):
    pipe = crowd.bare
    before = embeddings(pipe, "a dog")
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    base = draw(pipe, None, **zeros)
    with attached(pipe, crowd.adapters[0]):
        with pytest.raises(GatingError, match=r"was not made by this text_encoder.*after attach"):
            draw(pipe, None, **before)
        assert torch.equal(draw(pipe, None, **zeros), base)
    with attached(pipe, crowd.adapters[0], gating="none"):
        assert draw(pipe, None, **before).isfinite().all()


def test_weighted_embeddings_need_no_recognition_where_the_unet_has_no_gates(pipe):
    """What is gated in the text encoder alone is done with when its embeddings are weighted."""
    targets = [component for component in components(pipe) if component != "unet"]
    for chosen, recognised in ((targets, False), ([*targets, "unet.attn2.to_k"], True)):
        with attached(pipe, trained_adapter(pipe, targets=chosen)):
            weighted = {name: value * 1.1 for name, value in embeddings(pipe, "a <rex>").items()}
            if recognised:
                with pytest.raises(GatingError, match="was not made by this text_encoder"):
                    draw(pipe, None, **weighted)
            else:
                assert draw(pipe, None, **weighted).isfinite().all()


def test_long_prompts_may_be_encoded_in_chunks(crowd):
    def drawn(pipe, last="<c2> and a <c0>"):
        parts = [embeddings(pipe, chunk) for chunk in ("a dog in the snow", "a <c1>", last)]
        whole = {n: torch.cat([p[n] for p in parts], dim=1) for n in parts[0] if "pooled" not in n}
        return draw(pipe, None, **parts[0] | whole)

    with attached(crowd.bare, *crowd.adapters[:3]):
        assert torch.equal(drawn(crowd.bare), drawn(crowd.full))
        assert not torch.allclose(drawn(crowd.bare), drawn(crowd.bare, last="a dog and a cat"), atol=1e-4)


def test_positions_in_later_chunks_are_where_they_should_be():
    pipe = tiny.pipeline("sd1")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter, length = trained_adapter(pipe, targets=[name]), pipe.tokenizer.model_max_length
    seen = {}
    with attached(pipe, adapter):
        layer = sites(pipe)[name].module
        layer.register_forward_hook(lambda m, x, y: seen.update(changed=(y - m.base(x[0])).abs().sum(-1) > 0))
        parts = [embeddings(pipe, chunk)["prompt_embeds"] for chunk in ("a dog", "a bird and a <rex>")]
        draw(pipe, None, prompt_embeds=torch.cat(parts, dim=1), guidance_scale=1.0, num_inference_steps=1)
    assert seen["changed"].nonzero().tolist() == [[0, length + 5]]  # after the start, "a bird and a"


@pytest.mark.parametrize("vectors", [1, 3])
def test_inside_the_unet_keys_and_values_change_at_the_tokens_alone(vectors, pipe):
    seen = {}
    adapter = trained_adapter(pipe, targets=["unet.attn2.to_k", "unet.attn2.to_v"], vectors=vectors)
    with attached(pipe, adapter):
        for name in adapter.layer_names:
            sites(pipe)[name].module.register_forward_hook(
                lambda m, x, y, name=name: seen.update({name: (y - m.base(x[0])).abs().sum(-1) > 0})
            )
        draw(
            pipe, ["a <rex>", "a dog", "<rex> and <rex>"], num_inference_steps=1, negative_prompt=["<rex>", "", "a cat"]
        )
    assert len(seen) == len(adapter.layer_names)
    starts = [(0, 1), (3, 2), (5, 1), (5, 2 + vectors)]
    for changed in seen.values():
        assert changed.nonzero().tolist() == [[b, p + i] for b, p in starts for i in range(vectors)]


def test_image_to_image_from_the_same_components(crowd, family):
    kind = StableDiffusionXLImg2ImgPipeline if family == "sdxl" else StableDiffusionImg2ImgPipeline
    options = {"image": torch.rand(1, 3, 16, 16), "strength": 1.0, "num_inference_steps": 1}

    def redraw(pipe, prompt):
        other = kind(**pipe.components)
        other.set_progress_bar_config(disable=True)
        return draw(other, prompt, **options)

    base = redraw(crowd.bare, "a dog")
    with attached(crowd.bare, crowd.adapters[2]):
        alone = redraw(crowd.bare, "a <c2>")
    assert torch.equal(redraw(crowd.full, "a dog"), base)
    assert torch.equal(redraw(crowd.full, "a <c2>"), alone) and not torch.equal(alone, base)


@pytest.mark.parametrize("prompts", [("a <c0>", "a dog"), ("a dog", "a <c0>"), ("a <c0>", "the snow and a <c0> <c1>")])
def test_the_two_prompts_of_sdxl_may_differ(prompts, crowds):
    bare, full, adapters = crowds["sdxl"]
    options = {"prompt_2": prompts[1], "negative_prompt": "a cat", "negative_prompt_2": "a <c4>"}
    with attached(bare, adapters[0], adapters[1], adapters[4]):
        assert torch.equal(draw(bare, prompts[0], **options), draw(full, prompts[0], **options))
    plain = {"prompt_2": "a bird", "negative_prompt": "a cat", "negative_prompt_2": "a dog"}
    assert torch.equal(draw(full, "a dog", **plain), draw(bare, "a dog", **plain))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_is_recognised(family, skip):
    pipe = tiny.pipeline(family)
    if family == "sd1":  # diffusers 0.42 reads clip_skip through the old layout only
        pipe.register_modules(text_encoder=tiny.old_clip_layout(pipe.text_encoder))
    options = {"clip_skip": min(skip, 1 if family == "sdxl" else 2), "num_inference_steps": 1}
    base, one, two = draw(pipe, **options), trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1)
    with attached(pipe, one):
        alone = draw(pipe, "a <a>", **options)
    with attached(pipe, two, one):
        assert torch.equal(draw(pipe, **options), base)
        assert torch.equal(draw(pipe, "a <a>", **options), alone) and not torch.equal(alone, base)


def test_embeddings_that_compel_weighs_are_exact_or_refused():
    """compel scales rows away from the empty prompt's. The last row identifies a prompt: the others may change."""
    pipe = tiny.pipeline("sd1")
    one, two = trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1)

    def drawn(*rows):
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        prompt, empty = (pipe.encode_prompt(text, **options)[0] for text in ("a <a>", ""))
        weights = torch.ones(1, prompt.shape[1], 1)
        weights[:, list(rows)] = 1.3
        embeds = torch.lerp(empty, prompt, weights) if rows else prompt
        return draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=empty, num_inference_steps=1)

    with attached(pipe, one):
        alone, plain = drawn(1, 2), drawn()
    with attached(pipe, two, one):
        assert torch.equal(drawn(1, 2), alone) and not torch.equal(alone, plain)
        with pytest.raises(GatingError, match="was not made by this text_encoder") as caught:
            drawn(-1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_hold_in_half_precision_and_under_autocast(dtype, crowds):
    adapters = crowds["sd1"].adapters
    for cast in (False, True):
        pipe = tiny.pipeline("sd1")
        for part in () if cast else (*components(pipe).values(), pipe.vae):
            part.to(dtype)

        def run(prompt, pipe=pipe, cast=cast):
            with torch.autocast("cpu", dtype, enabled=cast):
                return draw(pipe, prompt, num_inference_steps=1)

        base = run("a dog")
        with attached(pipe, adapters[1]):
            alone = run("a <c1>")
        with attached(pipe, *adapters):
            assert torch.equal(run("a dog"), base)
            assert torch.equal(run("a <c1>"), alone)
        assert base.isfinite().all() and alone.isfinite().all() and not torch.equal(alone, base)


def test_strength_zero_silences_a_concept_but_keeps_its_word(crowd):
    pipe, adapters = crowd.bare, crowd.adapters
    with attached(pipe, replace(adapters[2], branches=())):
        word_alone = draw(pipe, "a <c2>")
    with attached(pipe, adapters[0]), attach(pipe, adapters[2]) as handle:
        handle.strength("<c2>", 0)
        assert torch.equal(draw(pipe, "a <c2>"), word_alone)
        handle.strength("<c2>", 1)
        assert torch.equal(draw(pipe, "a <c2>"), draw(crowd.full, "a <c2>"))


def test_strength_is_linear_at_the_gated_rows():
    pipe, seen = tiny.pipeline("sd1"), {}
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    with attach(pipe, trained_adapter(pipe, targets=[name])) as handle:
        sites(pipe)[name].module.register_forward_hook(lambda m, x, y: seen.update(change=y - m.base(x[0])))
        for strength in (1.0, 0.25, -2.0):
            handle.strength("rex", strength)
            draw(pipe, "a <rex>", num_inference_steps=1, guidance_scale=1.0)
            seen[strength] = seen["change"]
    assert torch.allclose(seen[0.25], 0.25 * seen[1.0], atol=1e-5)
    assert torch.allclose(seen[-2.0], -2 * seen[1.0], atol=1e-5)


def test_a_renamed_adapter_answers_to_its_new_word(crowd):
    with attached(crowd.bare, crowd.adapters[0], crowd.adapters[2].renamed({"<c2>": "<max>"})):
        assert torch.equal(draw(crowd.bare, "a <max>"), draw(crowd.full, "a <c2>"))


def test_gating_is_chosen_at_attach_over_what_the_file_says(pipe):
    base = draw(pipe, num_inference_steps=1)
    gated, plain = trained_adapter(pipe), trained_adapter(pipe, gated=False)
    choices = ((gated, None, True), (gated, "none", False), (plain, None, False), (plain, "tokens", True))
    for adapter, gating, silent in choices:
        with attached(pipe, adapter, gating=gating):
            assert torch.equal(draw(pipe, num_inference_steps=1), base) is silent
