"""Targets: a pattern a person can write names exactly the layers it says (law 12)."""

import pytest
import torch

import tiny
from fusion.errors import UnknownName
from fusion.layer_names import component_of, sees_tokens
from fusion.models.layer_sites import components, sites
from fusion.models.targets import default_targets, resolve


@pytest.fixture
def names(pipe):
    return list(sites(pipe))


def levels(name):
    return name.split(".")


def test_a_block_kind_names_all_its_layers_and_no_others(names):
    for kind in ("attn1", "attn2", "ff", "proj_in", "proj_out", "resnets"):
        found = resolve([f"unet.{kind}"], names)
        assert found == tuple(n for n in names if component_of(n) == "unet" and kind in levels(n)) and found


def test_a_bare_component_means_its_attention(names):
    assert resolve(["unet"], names) == resolve(["unet.attn1", "unet.attn2"], names)
    assert resolve(["text_encoder"], names) == resolve(["text_encoder.self_attn"], names)
    assert not [n for n in resolve(["text_encoder"], names) if "mlp" in n or component_of(n) != "text_encoder"]


def test_patterns_join_in_the_order_of_the_layers(names):
    both = resolve(["text_encoder.mlp", "unet.attn2.to_k", "unet.attn2"], names)
    assert both == tuple(
        n for n in names if n in {*resolve(["text_encoder.mlp"], names), *resolve(["unet.attn2"], names)}
    )
    assert len(set(both)) == len(both)


def test_levels_must_stand_together_and_a_star_bridges_them(names):
    middle = resolve(["unet.mid_block.*.attn2"], names)
    assert middle == tuple(n for n in names if n.startswith("unet.mid_block.") and ".attn2." in n)
    assert resolve(["unet.mid_block.*.attn2.to_k"], names) == tuple(n for n in middle if n.endswith("to_k"))
    with pytest.raises(UnknownName, match=r"'unet\.mid_block\.attn2' names no layer"):
        resolve(["unet.mid_block.attn2"], names)
    assert resolve(["unet.*"], names) == tuple(n for n in names if component_of(n) == "unet")


def test_numbers_belong_to_the_level_before_them():
    names = [
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        "unet.up_blocks.11.attentions.0.transformer_blocks.1.attn1.to_q",
        "unet.up_blocks.1.attentions.10.transformer_blocks.0.attn10.to_q",
    ]
    assert resolve(["unet.up_blocks.1"], names) == (names[0], names[3])
    assert resolve(["unet.attentions.1"], names) == (names[1],)
    assert resolve(["unet.transformer_blocks.1"], names) == (names[2],)
    assert resolve(["unet.attn1"], names) == tuple(names[:3])


def test_every_full_name_is_its_own_pattern(names):
    for name in names:
        assert name in resolve([name], names)
        assert all(other.startswith(name) or f".{name.partition('.')[2]}" in other for other in resolve([name], names))


@pytest.mark.parametrize(
    "wrong, hint",
    [
        ("unet.atn2", r"'unet\.atn2' names no layer of this base; did you mean 'unet\.attn2'\? It has"),
        ("text_encodr", r"did you mean 'text_encoder'\?"),
        ("zzz", r"'zzz' names no layer of this base\. It has, among others: text_encoder, "),
        ("", r"'' names no layer"),
        ("unet.attn2.to_kk", "names no layer"),
        ("UNET.attn2", "names no layer"),
    ],
)
def test_an_unknown_target_is_named_with_a_suggestion(wrong, hint, names):
    with pytest.raises(UnknownName, match=hint):
        resolve(["unet.attn1", wrong], names)


def test_defaults_name_layers_of_every_component(pipe, names):
    gated, open_ones = (resolve(default_targets(components(pipe), gated=g), names) for g in (True, False))
    assert {component_of(n) for n in gated} == {component_of(n) for n in open_ones} == set(components(pipe))
    assert all(sees_tokens(n) for n in gated) and not all(sees_tokens(n) for n in open_ones)
    assert set(gated) < set(open_ones)
    assert {component_of(n) for n in resolve(default_targets(["unet"], gated=True), names)} == {"unet"}


def test_layers_that_see_tokens_are_those_given_one_row_per_token(pipe, family):
    """Held against the inputs the layers really get."""
    rows, hooks = {}, []
    for name, site in sites(pipe).items():
        hooks.append(site.module.register_forward_hook(lambda _m, x, _y, name=name: rows.update({name: x[0].shape})))
    pipe("a dog", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    length = pipe.tokenizer.model_max_length
    for name, shape in rows.items():
        width = pipe.unet.config.cross_attention_dim
        fed = len(shape) == 3 and shape[1] == length and (component_of(name) != "unet" or shape[2] == width)
        assert sees_tokens(name) == fed, name
    assert len(rows) == len(hooks)


def test_targets_of_a_real_size_are_resolved_at_once():
    blocks = [
        f"unet.down_blocks.{b}.attentions.{a}.transformer_blocks.{t}"
        for b in range(3)
        for a in range(3)
        for t in range(10)
    ]
    names = [f"{block}.attn{n}.to_{p}" for block in blocks for n in (1, 2) for p in ("q", "k", "v", "out.0")]
    assert len(resolve(["unet.attn2"], names)) == len(names) // 2
    assert tiny.FAMILIES
