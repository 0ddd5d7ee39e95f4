"""Attaching is reversible and exact: fresh adapters change no bit, detaching leaves no trace (laws 2 and 4)."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import tiny
from fusion.adapters import ADAPTERS
from fusion.errors import BaseMismatch, ConfigError, FusionError, GatingError, TokenConflict, UnknownName
from fusion.layer_names import TOKENIZERS
from fusion.models.attachment import attach, detached
from fusion.models.layer_sites import components, sites
from trained import attached, draw, everywhere, fresh_adapter, trained_adapter

every_type = pytest.mark.parametrize("kind", ADAPTERS)


@pytest.fixture
def pipe(pipe):
    draw(pipe, num_inference_steps=1)  # transformers puts hooks of its own in at the first call
    return pipe


def state(pipe):
    """Everything of a pipeline that attaching could leave behind, by identity."""
    parts = components(pipe)
    return {
        "modules": {n: [(path, id(m)) for path, m in part.named_modules()] for n, part in parts.items()},
        "keys": {n: list(part.state_dict()) for n, part in parts.items()},
        "parameters": {
            n: [(key, id(p), p.requires_grad) for key, p in part.named_parameters()] for n, part in parts.items()
        },
        "hooks": {
            (n, path): [len(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for n, part in parts.items()
            for path, m in part.named_modules()
        },
        "tokenizers": {n: id(getattr(pipe, TOKENIZERS[n])) for n in parts if n in TOKENIZERS},
        "words": {n: len(getattr(pipe, TOKENIZERS[n])) for n in parts if n in TOKENIZERS},
        "bits": {n: [(id(p), p._version) for p in part.parameters()] for n, part in parts.items()},
    }


@every_type
@pytest.mark.parametrize("gated", [True, False])
def test_a_fresh_adapter_changes_no_bit(kind, gated, pipe):
    """The concept's own prompt runs through the same token embeddings; its layers add exactly nothing."""
    adapter = fresh_adapter(pipe, kind=kind, gated=gated, targets=everywhere(pipe))
    silent = replace(adapter, branches=())
    with attached(pipe, silent):
        expected = draw(pipe, ["a <rex>", "a dog"])
    with attached(pipe, adapter):
        assert torch.equal(draw(pipe, ["a <rex>", "a dog"]), expected)


@every_type
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_in_half_precision(kind, dtype):
    pipe = half(tiny.pipeline("sd1"), dtype)
    base = draw(pipe, num_inference_steps=1)
    with attached(pipe, fresh_adapter(pipe, kind=kind, gated=False, targets=everywhere(pipe))):
        assert torch.equal(draw(pipe, num_inference_steps=1), base)


def half(pipe, dtype):
    for part in (*components(pipe).values(), pipe.vae):
        part.to(dtype)
    return pipe


@every_type
def test_a_trained_adapter_changes_the_picture_and_leaves_no_trace(kind, pipe):
    before, base = state(pipe), draw(pipe, ["a dog", "a <rex>"])
    handle = attach(pipe, trained_adapter(pipe, kind=kind, gated=False, targets=everywhere(pipe)))
    for component, part in components(pipe).items():
        assert list(part.state_dict()) == before["keys"][component]
        assert [id(p) for p in part.parameters()] == [p[1] for p in before["parameters"][component]]
    assert not torch.allclose(draw(pipe, ["a dog", "a <rex>"]), base, atol=1e-3)
    handle.detach()
    assert state(pipe) == before and torch.equal(draw(pipe, ["a dog", "a <rex>"]), base)
    handle.detach()  # a second time does nothing
    assert state(pipe) == before


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2)])
def test_adapters_come_and_go_in_any_order(order, pipe, family):
    adapters = [
        trained_adapter(pipe, "<a>", kind="additive", k=0),
        trained_adapter(pipe, "<b>", kind="lora", k=1, vectors=2, targets=everywhere(pipe)),
        trained_adapter(pipe, "<c>", kind="rotational", k=2, gated=False),
    ]
    before, prompts = state(pipe), ["a dog", "a <a>", "a <b> and a <a>"]
    handles, other = dict(enumerate(attach(pipe, adapter) for adapter in adapters)), tiny.pipeline(family)
    for gone in order:
        handles.pop(gone).detach()
        with attached(other, *(adapters[i] for i in handles)):  # never saw more than these
            expected = draw(other, prompts, num_inference_steps=1)
        assert torch.equal(draw(pipe, prompts, num_inference_steps=1), expected)
    assert state(pipe) == before


def test_a_with_block_detaches_even_when_it_fails(pipe):
    before = state(pipe)
    with pytest.raises(ZeroDivisionError), attach(pipe, trained_adapter(pipe)):
        draw(pipe, "a <rex>", num_inference_steps=1)
        raise ZeroDivisionError
    assert state(pipe) == before


def test_others_use_a_pipeline_between_the_steps_of_one_who_has_adapters_attached(pipe):
    prompts = ["a <rex>", "a dog"]
    before, base = state(pipe), draw(pipe, prompts[1:])
    with attach(pipe, trained_adapter(pipe)), attach(pipe, trained_adapter(pipe, "<tom>", k=1)) as other:
        expected = draw(pipe, prompts)
        with detached(pipe):
            assert torch.equal(draw(pipe, prompts[1:]), base)
            with attached(pipe, trained_adapter(pipe, k=1)):  # the same token
                assert not torch.equal(draw(pipe, prompts)[:1], expected[:1])
        assert torch.equal(draw(pipe, prompts), expected)
        with detached(pipe):
            other.detach()  # stays detached
        assert torch.equal(draw(pipe, prompts), expected) and len(pipe.tokenizer("a <tom>").input_ids) > 4
    with detached(pipe):
        assert state(pipe) == before
    assert state(pipe) == before


def test_a_failed_attach_leaves_the_pipeline_as_found(pipe, monkeypatch):
    adapter = trained_adapter(pipe, targets=everywhere(pipe))
    rows = adapter.tokens["<rex>"]
    wrong = [
        (replace(adapter, tokens={}), BaseMismatch, "no embedding for the text_encoder"),
        (replace(adapter, tokens={"<rex>": {c: r[:, :5] for c, r in rows.items()}}), BaseMismatch, r"\(1, 5\)"),
        (replace(adapter, tokens={"<rex>": {c: r[:0] for c, r in rows.items()}}), BaseMismatch, r"needs \(1, "),
    ]
    before = state(pipe)
    for broken, kind, message in wrong:
        with pytest.raises(kind, match=message):
            attach(pipe, broken)
        assert state(pipe) == before
    middle = list(adapter.layers.values())[len(adapter.layers) // 2]

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(middle, "delta", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attach(pipe, adapter)
    assert state(pipe) == before


def test_one_pipeline_with_adapters_is_untouched_by_a_failed_attach(pipe):
    first = trained_adapter(pipe)
    with attached(pipe, first):
        before, picture = state(pipe), draw(pipe, "a <rex>")
        with pytest.raises(TokenConflict, match=r"<rex> is attached to this pipeline already.*renamed"):
            attach(pipe, trained_adapter(pipe, k=1, targets=everywhere(pipe)))
        assert state(pipe) == before and torch.equal(draw(pipe, "a <rex>"), picture)


def test_dropping_a_pipeline_frees_it_with_what_is_attached():
    pipe = tiny.pipeline("sdxl")
    attach(pipe, trained_adapter(pipe, targets=everywhere(pipe)))
    draw(pipe, "a <rex>", num_inference_steps=1)
    watched = [weakref.ref(pipe), weakref.ref(pipe.unet), weakref.ref(pipe.text_encoder_2)]
    del pipe
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_a_detached_handle_does_not_keep_adapted_layers_alive(pipe):
    handle = attach(pipe, trained_adapter(pipe))
    adapted = [weakref.ref(m) for m in pipe.unet.modules() if type(m).__name__ == "AdaptedLinear"]
    assert adapted
    handle.detach()
    gc.collect()
    assert not any(ref() for ref in adapted)


def test_pipelines_of_the_same_components_share_what_is_attached():
    pipe = tiny.pipeline("sd1")
    before, base = state(pipe), draw(pipe, "a <a> and a <b>")
    one, two = trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1)
    with attached(pipe, one, two):
        both = draw(pipe, "a <a> and a <b>")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    first, second = attach(pipe, one), attach(other, two)
    assert torch.equal(draw(pipe, "a <a> and a <b>"), both)
    first.detach()
    with pytest.raises(TokenConflict, match="<b> is attached"):
        attach(pipe, two)
    second.detach()
    assert state(pipe) == before and torch.equal(draw(pipe, "a <a> and a <b>"), base)
    assert other.tokenizer is pipe.tokenizer


def test_a_pipeline_built_in_between_never_mistakes_one_concept_for_another():
    pipe, options = tiny.pipeline("sd1"), {"image": torch.rand(1, 3, 16, 16), "strength": 1.0}

    def redraw(prompt, built):
        return draw(built, prompt, **options)

    def build():
        built = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        built.set_progress_bar_config(disable=True)
        return built

    spelled = [redraw(f"a {token}", build()) for token in ("<a>", "<b>")]  # no words yet
    first, second = attach(pipe, trained_adapter(pipe, "<a>")), attach(pipe, trained_adapter(pipe, "<b>", k=1))
    between = build()
    picture, ids = redraw("a <b>", between), between.tokenizer("a <a>", return_tensors="pt").input_ids
    first.detach()
    assert torch.equal(redraw("a <b>", between), picture)
    assert torch.equal(redraw("a <a>", between), spelled[0])
    with pytest.raises(TokenConflict, match="not attached any more"):
        pipe.text_encoder(ids)
    third = attach(pipe, trained_adapter(pipe, "<c>", k=2))
    with pytest.raises(TokenConflict, match="not attached any more"):
        pipe.text_encoder(ids)
    third.detach()
    second.detach()
    assert [
        torch.equal(redraw(f"a {token}", between), s) for token, s in zip(("<a>", "<b>"), spelled, strict=True)
    ] == [True, True]


def test_pipelines_that_share_only_some_components_are_refused():
    pipe, other = tiny.pipeline("sd1"), tiny.pipeline("sd1")
    other.text_encoder = pipe.text_encoder
    with attached(pipe, trained_adapter(pipe, "<a>")), pytest.raises(FusionError, match="shares some components"):
        attach(other, trained_adapter(other, "<b>"))


def test_weights_may_move_and_change_precision_while_attached():
    pipe = tiny.pipeline("sd1")
    adapter, before = trained_adapter(pipe, gated=False), state(pipe)
    handle = attach(pipe, adapter)
    half(pipe, torch.bfloat16)
    moved = draw(pipe, "a <rex>", num_inference_steps=1)
    handle.detach()
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    assert state(pipe)["modules"] == before["modules"] and state(pipe)["parameters"] == before["parameters"]
    with attached(pipe, adapter):
        assert torch.equal(draw(pipe, "a <rex>", num_inference_steps=1), moved)


def test_strength_zero_is_the_base_and_strengths_are_linear_at_a_layer(pipe):
    adapter = trained_adapter(pipe, gated=False, targets=["unet.attn2.to_k", "unet.proj_in"])
    base = draw(pipe)
    handle = attach(pipe, adapter)
    site = sites(pipe)
    for name in adapter.layer_names:
        module = site[name].module
        x = (
            torch.randn(2, 5, module.in_features)
            if hasattr(module, "in_features")
            else torch.randn(2, module.in_channels, 4, 4)
        )
        outputs = {}
        for strength in (0.0, 0.5, 1.0, 2.0, -1.0):
            handle.strength("rex", strength)
            outputs[strength] = module(x)
        change = outputs[1.0] - outputs[0.0]
        for strength, output in outputs.items():
            assert torch.allclose(output - outputs[0.0], strength * change, atol=1e-4)
    handle.strength("rex", 0)
    assert torch.equal(draw(pipe), base)
    handle.detach()


def test_strength_is_named_by_branch_token_or_adapter(pipe):
    one, two = trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1)
    branches = tuple(replace(b, name=n) for a, n in ((one, "left"), (two, "right")) for b in a.branches)
    both = replace(
        one,
        info=replace(one.info, name="pair", concepts=one.info.concepts + two.info.concepts),
        branches=branches,
        tokens={**one.tokens, **two.tokens},
    )
    with attached(pipe, one):
        alone = draw(pipe, "a <a>")
    with attached(pipe, replace(two, branches=())):
        silent = draw(pipe, "a <b>")
    with attach(pipe, both) as handle:
        loud = draw(pipe, "a <b>")
        for name in ("right", "<b>"):
            handle.strength(name, 0)
            assert torch.equal(draw(pipe, "a <b>"), silent) and torch.equal(draw(pipe, "a <a>"), alone)
            handle.strength(name, 1)
        assert torch.equal(draw(pipe, "a <b>"), loud)
        handle.strength("pair", 0)
        assert torch.equal(draw(pipe, "a <b>"), silent) and not torch.equal(draw(pipe, "a <a>"), alone)
        with pytest.raises(
            UnknownName, match=r"'rigth'; did you mean 'right'\? There are: left, right, <a>, <b>, pair\."
        ):
            handle.strength("rigth", 1)
        with pytest.raises(UnknownName, match=r"'zzz'\. There are"):
            handle.strength("zzz", 1)


def test_a_layer_that_has_not_changed_is_computed_once(monkeypatch):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe)
    layer, calls = next(iter(adapter.layers.values())), []
    delta = layer.delta
    object.__setattr__(layer, "delta", lambda: calls.append(1) or delta())
    pictures = []
    for change in (None, None, lambda p: p.mul_(2), lambda p: p.detach().view(-1)[0].add_(1)):
        if change:
            with torch.no_grad():
                change(next(layer.parameters()))
        with attached(pipe, adapter):
            pictures.append(draw(pipe, "a <rex>", num_inference_steps=1))
    assert len(calls) == 3
    assert torch.equal(*pictures[:2]) and not torch.equal(*pictures[1:3]) and not torch.equal(*pictures[2:])


def test_gating_is_a_choice_of_two(pipe):
    adapter = trained_adapter(pipe)
    with pytest.raises(ConfigError, match=r"'tokens' or 'none', got 'token'; did you mean 'tokens'\?"):
        attach(pipe, adapter, gating="token")
    nameless = replace(adapter, info=replace(adapter.info, concepts=()), tokens={}, branches=())
    with pytest.raises(GatingError, match=r"no concept token.*gating='none'"):
        attach(pipe, nameless, gating="tokens")


def test_an_adapter_without_concepts_works_where_the_text_encoder_is_gone():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, targets=["unet.attn2"], gated=False)
    imported = replace(adapter, info=replace(adapter.info, concepts=()), tokens={})
    embeds = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    pipe.text_encoder = pipe.tokenizer = None
    base = draw(pipe, None, prompt_embeds=embeds, guidance_scale=1.0)
    with attached(pipe, imported):
        assert not torch.equal(draw(pipe, None, prompt_embeds=embeds, guidance_scale=1.0), base)
    assert torch.equal(draw(pipe, None, prompt_embeds=embeds, guidance_scale=1.0), base)


def test_many_comings_and_goings_leave_nothing_behind():
    pipe, choose = tiny.pipeline("sd2"), random.Random(0)
    adapters = [trained_adapter(pipe, f"<c{i}>", k=i, gated=i % 2 == 0, vectors=1 + i % 3) for i in range(5)]
    before, base, handles = state(pipe), draw(pipe), {}
    for _ in range(40):
        i = choose.randrange(5)
        if i in handles:
            handles.pop(i).detach()
        else:
            handles[i] = attach(pipe, adapters[i])
    for handle in handles.values():
        handle.detach()
    assert state(pipe) == before and torch.equal(draw(pipe), base)


def test_peft_layers_pass_through(recwarn):
    """LoRAs loaded by diffusers before, or while, an adapter is attached are neither targets nor lost."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe = tiny.pipeline("sd1")
    names, base = list(sites(pipe)), draw(pipe)
    adapter = trained_adapter(pipe)
    handle = attach(pipe, adapter)
    torch.manual_seed(1)
    pipe.unet.add_adapter(lora)
    together = draw(pipe, "a <rex>")
    handle.detach()
    with_lora = draw(pipe)
    assert not torch.equal(with_lora, base)
    assert not any(type(m).__name__ == "AdaptedLinear" for m in pipe.unet.modules())
    assert list(sites(pipe)) == names
    with attached(pipe, adapter):
        assert torch.equal(draw(pipe, "a <rex>"), together) and torch.equal(draw(pipe), with_lora)
    assert torch.equal(draw(pipe), with_lora)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_take_adapters_and_forget_them():
    """Nothing is specialised on what was, or was not, attached when a block was compiled."""
    torch._dynamo.reset()
    pipe, prompts = tiny.pipeline("sd1"), ["a dog", "a <a> and a <b>"]
    adapters = [trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1, targets=["unet.attn2", "unet.ff"])]
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    base = draw(pipe, prompts, **options)
    with attached(pipe, *adapters):
        expected = draw(pipe, prompts, **options)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2.compile(backend="eager")
    assert torch.allclose(draw(pipe, prompts, **options), base, atol=1e-4)
    with attached(pipe, *adapters):
        assert torch.allclose(draw(pipe, prompts, **options), expected, atol=1e-4)
    assert torch.allclose(draw(pipe, prompts, **options), base, atol=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
