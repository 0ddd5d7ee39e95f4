"""Concept tokens are located in the UNet's prompts, recognised by content alone."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.errors import GatingError
from fusion.models import gates as module
from fusion.models.gates import PromptTracker

T, WIDTHS = 6, {"text_encoder": 5, "text_encoder_2": 3}
CPU = torch.device("cpu")


def encode(tracker, prompts, widths=WIDTHS, length=T, seed=0):
    """Pretend text encoders: embeddings (B, T, ΣD) no two of which are alike."""
    parts = []
    for component, width in widths.items():
        tracker.start_text(component, prompts, length, CPU)
        part = torch.randn(len(prompts), length, width, generator=torch.Generator().manual_seed(seed))
        tracker.remember(component, prompts, part[:, -1][None])
        parts.append(part)
    return torch.cat(parts, dim=-1)


def rows(tracker, *gate, by_token=True, component="unet"):
    """Where a gate is open in an input of as many rows, or pictures, as there are."""
    of_call = tracker.rows(component, by_token)
    matching = of_call and of_call.matching(gate, torch.empty(of_call.size, 1))
    return [] if matching is None else matching.tolist()


prompt = st.dictionaries(
    st.sampled_from(["<a>", "<b>"]), st.sets(st.integers(0, T - 1), min_size=1).map(lambda s: tuple(sorted(s)))
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    prompts=st.lists(prompt, min_size=1, max_size=4), order=st.randoms(use_true_random=False), chunks=st.integers(1, 3)
)
def test_prompts_are_recognised_however_they_are_put_together(prompts, order, chunks):
    tracker = PromptTracker(WIDTHS)
    embeds = encode(tracker, prompts)
    picks = [[order.randrange(len(prompts)) for _ in range(chunks)] for _ in range(5)]
    tracker.start_unet(torch.stack([torch.cat([embeds[i] for i in pick]) for pick in picks]))
    for token in ("<a>", "<b>"):
        at = {
            (b, c * T + p)
            for b, pick in enumerate(picks)
            for c, i in enumerate(pick)
            for p in prompts[i].get(token, ())
        }
        assert rows(tracker, token) == sorted(b * chunks * T + p for b, p in at)
        assert rows(tracker, token, by_token=False) == sorted({b for b, _ in at})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prompts_are_recognised_after_a_cast_to_half_precision(dtype):
    tracker = PromptTracker(WIDTHS)
    tracker.start_unet(encode(tracker, [{"<a>": (2,)}, {}]).to(dtype))
    assert rows(tracker, "<a>") == [2]
    half = PromptTracker({"text_encoder": 5})
    part = torch.randn(1, T, 5).to(dtype)
    half.start_text("text_encoder", [{"<a>": (1,)}], T, CPU)
    half.remember("text_encoder", [{"<a>": (1,)}], part[:, -1][None])
    half.start_unet(part.float())
    assert rows(half, "<a>") == [1]


def test_each_encoder_has_its_own_prompt_and_both_count():
    tracker = PromptTracker(WIDTHS)
    parts = []
    for component, prompts in (("text_encoder", [{"<a>": (1, 2)}]), ("text_encoder_2", [{"<a>": (2, 4), "<b>": (3,)}])):
        tracker.start_text(component, prompts, T, CPU)
        parts.append(torch.randn(1, T, WIDTHS[component]))
        tracker.remember(component, prompts, parts[-1][:, -1][None])
    tracker.start_unet(torch.cat(parts, dim=-1))
    assert rows(tracker, "<a>") == [1, 2, 4] and rows(tracker, "<b>") == [3]


def test_text_layers_read_the_call_under_way():
    tracker = PromptTracker(WIDTHS)
    assert rows(tracker, "<a>", component="text_encoder") == []
    tracker.start_text("text_encoder", [{}, {"<a>": (0, 5)}, {"<a>": (1,)}], T, CPU)
    assert rows(tracker, "<a>", component="text_encoder") == [6, 11, 13]
    assert rows(tracker, "<a>", "<zzz>", by_token=False, component="text_encoder") == [1, 2]
    assert rows(tracker, "<a>", component="text_encoder_2") == []
    tracker.start_text("text_encoder", [{}], T, CPU)
    assert rows(tracker, "<a>", component="text_encoder") == []


@pytest.mark.parametrize(
    "strange",
    [
        lambda e: e * 1.001,
        lambda e: (e[:1] + e[1:]) / 2,
        lambda e: e.roll(1, dims=1),
        lambda e: e[:, :-1],
        lambda e: e[..., :-1],
        lambda e: torch.cat([e[..., 3:], e[..., :3]], dim=-1),
    ],
)
def test_embeddings_of_unknown_origin_are_an_error(strange):
    tracker = PromptTracker(WIDTHS)
    embeds = encode(tracker, [{"<a>": (2,)}, {}])
    with pytest.raises(
        GatingError, match=r"Encode prompts with this pipeline after attach\(\), or attach with gating='none'"
    ):
        tracker.start_unet(strange(embeds))


def test_before_anything_is_encoded_only_zeros_are_known():
    tracker = PromptTracker(WIDTHS)
    with pytest.raises(GatingError, match="prompt 1 was not made by this text_encoder"):
        tracker.start_unet(torch.randn(1, T, 8))
    tracker.start_unet(torch.zeros(2, T, 8))
    assert rows(tracker, "<a>") == []


def test_zeros_are_a_prompt_without_tokens_beside_others():
    tracker = PromptTracker(WIDTHS)
    embeds = encode(tracker, [{"<a>": (2,)}])
    tracker.start_unet(torch.cat([torch.zeros_like(embeds), embeds]))
    assert rows(tracker, "<a>") == [T + 2] and rows(tracker, "<a>", by_token=False) == [1]


def test_embeddings_changed_in_place_are_read_again():
    tracker = PromptTracker(WIDTHS)
    with_token, without = encode(tracker, [{"<a>": (2,)}]), encode(tracker, [{}], seed=1)
    embeds = with_token.clone()
    tracker.start_unet(embeds)
    assert rows(tracker, "<a>") == [2]
    embeds.copy_(without)
    tracker.start_unet(embeds)
    assert rows(tracker, "<a>") == []


def test_the_embeddings_read_last_are_not_kept_alive():
    tracker = PromptTracker(WIDTHS)
    embeds = encode(tracker, [{"<a>": (2,)}]).clone().requires_grad_() * 1
    watched = weakref.ref(embeds)
    tracker.start_unet(embeds)
    del embeds
    gc.collect()
    assert watched() is None


def test_the_oldest_prompts_are_forgotten_first(monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", 12)  # 3 forms in each of 2 encoders: two prompts
    tracker = PromptTracker(WIDTHS)
    made = [encode(tracker, [{"<a>": (i,)}], seed=i) for i in range(2)]
    tracker.start_unet(made[0])
    encode(tracker, [{"<a>": (0,)}], seed=0)  # used again
    made.append(encode(tracker, [{"<a>": (2,)}], seed=2))
    for i in (0, 2):
        tracker.start_unet(made[i])
        assert rows(tracker, "<a>") == [i]
    with pytest.raises(GatingError):
        tracker.start_unet(made[1])


def test_hundreds_of_sdxl_prompts_are_remembered():
    """Both encoders hand out every hidden state: 13 and 33, plain and normalised, beside the last."""
    tracker = PromptTracker(WIDTHS)
    first = None
    for i in range(100):
        parts = []
        for component, layers in (("text_encoder", 28), ("text_encoder_2", 68)):
            prompts = [{"<a>": (i % T,)}]
            tracker.start_text(component, prompts, T, CPU)
            states = torch.randn(layers, 1, WIDTHS[component])
            tracker.remember(component, prompts, states)
            parts.append(torch.cat([torch.zeros(1, T - 1, WIDTHS[component]), states[3][:, None]], dim=1))
        first = torch.cat(parts, dim=-1) if first is None else first
    tracker.start_unet(first)
    assert rows(tracker, "<a>") == [0]


def test_the_restoring_hook_brings_one_component_back():
    tracker = PromptTracker(WIDTHS)
    one = encode(tracker, [{"<a>": (1,)}])
    tracker.start_unet(one)
    restore = tracker.restoring_hook("unet")
    two = encode(tracker, [{"<a>": (4,)}], seed=1)
    tracker.start_unet(two)
    restore(torch.zeros(()))
    assert rows(tracker, "<a>") == [1]
    assert rows(tracker, "<a>", component="text_encoder") == [4]
    tracker.start_unet(two)
    assert rows(tracker, "<a>") == [4]
