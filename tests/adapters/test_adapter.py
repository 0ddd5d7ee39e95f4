"""An adapter is a value: what it says of itself, what it refuses to be, and its fingerprint."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fusion.adapters import adapter as adapter_module
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept, DigestCache, digest_of
from fusion.errors import FusionError, TokenConflict
from fusion.spectral.slices import SpectralSlice
from trained import trained_layer


def adapter(name="dog", token="<dog>", kinds=("additive",), strength=1.0):
    torch.manual_seed(5)
    branches = tuple(
        Branch(
            f"{name}-{i}",
            kind,
            {layer: trained_layer(kind, torch.randn(20, 12), k=i) for layer in ("unet.a", "unet.b")[: i + 1]},
            (SpectralSlice.contiguous(i, 4),),
            gate=(token,),
            strength=strength,
        )
        for i, kind in enumerate(kinds)
    )
    info = AdapterInfo(name, None, (Concept(token, "dog"),))
    return Adapter(info, branches, {token: {"text_encoder": torch.randn(1, 8)}})


def step(options, one):
    """One step of an optimizer, on every parameter."""
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(list(one.parameters()), **options).step()


@pytest.mark.parametrize("token", ["dog", "<Dog>", "<dog", "<>", "<my dog>", "<dög>", "<a>b", "<a><b>", "", "<dog>\n"])
def test_a_concept_token_is_a_word_in_angle_brackets(token):
    with pytest.raises(TokenConflict, match=r"cannot be a concept token.*like <dog>"):
        Concept(token)


def test_a_concept_of_several_vectors_has_a_word_for_each():
    assert Concept("<my-dog_2>", vectors=3).pieces == ("<my-dog_2>", "<my-dog_2>_1", "<my-dog_2>_2")
    with pytest.raises(TokenConflict, match=r"<dog> needs at least 1 embedding vector, got 0"):
        Concept("<dog>", vectors=0)


def test_changes_are_summed_over_branches_with_their_strengths_and_without_gradient():
    two = adapter(kinds=("additive", "lora"), strength=0.5)
    found = two.deltas()
    assert list(found) == list(two.layer_names) == ["unet.a", "unet.b"]
    first, second = (branch.layers for branch in two.branches)
    expected = 0.5 * first["unet.a"].delta().dense() + 0.5 * second["unet.a"].delta().dense()
    assert torch.allclose(found["unet.a"].dense(), expected, atol=1e-6)
    assert torch.allclose(found["unet.b"].dense(), 0.5 * second["unet.b"].delta().dense(), atol=1e-6)
    assert not found["unet.a"].dense().requires_grad
    assert two.rank == 8 + 4 and two.slices == (SpectralSlice(0, 4), SpectralSlice(4, 4))


def test_layers_belong_to_an_adapter_of_one_branch():
    assert list(adapter().layers) == ["unet.a"]
    with pytest.raises(FusionError, match=r"'dog' has 2 branches; read \.branches"):
        _ = adapter(kinds=("additive", "lora")).layers


def test_gates_are_tokens_of_its_own_concepts_and_names_are_distinct():
    whole = adapter(kinds=("additive", "lora"))
    assert whole.gated and not replace(whole, branches=()).gated
    with pytest.raises(TokenConflict, match=r"is gated by <cat>, which has no concept"):
        replace(whole, branches=(replace(whole.branches[0], gate=("<cat>",)),))
    with pytest.raises(TokenConflict, match="Two branches of 'dog' are called 'dog-0'"):
        replace(whole, branches=(whole.branches[0],) * 2)
    with pytest.raises(TokenConflict, match="Two concepts of 'dog' are called <dog>"):
        replace(whole, info=replace(whole.info, concepts=whole.info.concepts * 2))


def pair():
    one, two = adapter("dog", "<dog>"), adapter("cat", "<cat>")
    info = AdapterInfo("pair", None, one.info.concepts + two.info.concepts)
    return Adapter(info, one.branches + two.branches, {**one.tokens, **two.tokens})


def test_renaming_changes_the_words_and_nothing_else():
    before = pair()
    after = before.renamed({"<dog>": "<rex>"})
    assert [c.token for c in after.info.concepts] == ["<rex>", "<cat>"]
    assert [b.gate for b in after.branches] == [("<rex>",), ("<cat>",)]
    assert after.tokens["<rex>"] is before.tokens["<dog>"] and "<dog>" not in after.tokens
    assert [b.layers for b in after.branches] == [b.layers for b in before.branches]
    assert after.renamed({"<rex>": "<dog>"}).digest() == before.digest()


def test_names_can_be_swapped_but_not_shared():
    swapped = pair().renamed({"<dog>": "<cat>", "<cat>": "<dog>"})
    assert [b.gate for b in swapped.branches] == [("<cat>",), ("<dog>",)]
    assert torch.equal(swapped.tokens["<cat>"]["text_encoder"], pair().tokens["<dog>"]["text_encoder"])
    with pytest.raises(TokenConflict, match="Two concepts of 'pair' are called <cat>"):
        pair().renamed({"<dog>": "<cat>"})
    with pytest.raises(TokenConflict, match=r"'pair' has no token <cow>; it has <dog>, <cat>"):
        pair().renamed({"<cow>": "<dog>"})
    with pytest.raises(TokenConflict, match="cannot be a concept token"):
        pair().renamed({"<dog>": "Rex"})


def test_the_digest_follows_everything_that_changes_a_picture_and_nothing_else():
    reference = adapter()
    assert adapter().digest() == reference.digest()
    assert replace(reference, info=replace(reference.info, name="other")).digest() == reference.digest()
    (branch,) = reference.branches
    changed = [
        replace(reference, branches=(replace(branch, strength=2.0),)),
        replace(reference, branches=(replace(branch, gate=()),)),
        replace(reference, branches=(replace(branch, layers={"unet.b": branch.layers["unet.a"]}),)),
        replace(reference, tokens={"<dog>": {"text_encoder": torch.zeros(1, 8)}}),
        reference.renamed({"<dog>": "<cat>"}),
    ]
    for name in branch.layers["unet.a"].state_dict():
        other = adapter()
        with torch.no_grad():
            other.layers["unet.a"].state_dict()[name].view(-1)[0] += 1
        changed.append(other)
    assert len({reference.digest(), *(other.digest() for other in changed)}) == 1 + len(changed)


def cached(one):
    return replace(one, digest_cache=DigestCache())


def test_a_cached_digest_is_computed_once(monkeypatch):
    one, expected, computed = cached(adapter()), adapter().digest(), []
    monkeypatch.setattr(adapter_module, "digest_of", lambda a: computed.append(a) or digest_of(a))
    assert [one.digest() for _ in range(3)] == [expected] * 3 and computed == [one]
    (branch,) = one.branches
    assert replace(one, branches=(replace(branch, strength=0.5),)).digest() != expected == one.digest()


CHANGES = {
    "in place": lambda one: one.layers["unet.a"].dV.detach()[-1].mul_(2),
    "another parameter": lambda one: setattr(one.layers["unet.a"], "dU", nn.Parameter(one.layers["unet.a"].dU + 1)),
    "another dtype": lambda one: one.layers["unet.a"].half(),
    "buffer": lambda one: one.layers["unet.a"].basis.S.mul_(2),
    "embedding": lambda one: one.tokens["<dog>"]["text_encoder"].add_(1),
    "all of .data": lambda one: one.layers["unet.a"].dU.data.add_(1),
    **{f"AdamW {options}": partial(step, options) for options in ({}, {"foreach": True}, {"fused": True})},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cached_digest_never_outlives_its_tensors(change):
    one = cached(adapter())
    before = one.digest()
    CHANGES[change](one)
    assert one.digest() == replace(one, digest_cache=None).digest() != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_digests_read_every_dtype(dtype):
    one = adapter()
    layers = {
        name: type(layer).from_tensors({k: t.to(dtype) for k, t in layer.state_dict().items()})
        for name, layer in one.layers.items()
    }
    stored = replace(one, branches=(replace(one.branches[0], layers=layers),))
    assert stored.digest() not in ("", one.digest())
    assert stored.deltas()["unet.a"].up.dtype == torch.float32
