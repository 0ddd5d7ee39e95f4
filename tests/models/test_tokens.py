"""Concept tokens: words and embeddings that come and go, without a trace in tokenizer or text encoder."""

import copy

import pytest
import torch

import tiny
from fusion.adapters.adapter import Concept
from fusion.errors import TokenConflict
from fusion.layer_names import TOKENIZERS
from fusion.models.attachment import attach
from fusion.models.layer_sites import components
from fusion.models.tokens import _with_words, embedding_of, initial_rows, text_encoders
from trained import attached, fresh_adapter, trained_adapter


def ids(pipe, text, component="text_encoder"):
    tokenizer = getattr(pipe, TOKENIZERS[component])
    return tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_rows_start_from_the_noun_with_a_little_noise(pipe):
    for component, row in initial_rows(pipe, Concept("<rex>", "dog")).items():
        weight = embedding_of(getattr(pipe, component)).weight
        noun = weight[getattr(pipe, TOKENIZERS[component]).convert_tokens_to_ids("dog</w>")]
        assert row.shape == (1, weight.shape[1]) and row.dtype == torch.float32 and not row.requires_grad
        assert 0 < (row[0] - noun).norm() < 0.05 * weight.std() * weight.shape[1] ** 0.5
        assert torch.equal(row, initial_rows(pipe, Concept("<rex>", "dog"))[component])


def test_several_vectors_take_the_pieces_of_the_noun_in_turn():
    pipe = tiny.pipeline("sd1")
    weight = embedding_of(pipe.text_encoder).weight.detach()
    pieces = pipe.tokenizer("dog cat", add_special_tokens=False).input_ids
    rows = initial_rows(pipe, Concept("<rex>", "dog cat", vectors=3))["text_encoder"]
    assert torch.allclose(rows, weight[[*pieces, pieces[0]]], atol=0.05 * float(weight.std()))
    one = initial_rows(pipe, Concept("<rex>", "dog cat"))["text_encoder"]
    assert torch.allclose(one, weight[pieces].mean(dim=0), atol=0.05 * float(weight.std()))
    nothing = initial_rows(pipe, Concept("<rex>", ""))["text_encoder"]
    assert torch.allclose(nothing, weight.mean(dim=0), atol=0.05 * float(weight.std()))


@pytest.mark.parametrize(
    "tokens", [("<a>", "<b>"), ("<red-dog-plush>", "<big-dog-plush>"), ("<x-12345678>", "<y-12345678>")]
)
def test_no_two_concepts_of_one_noun_start_alike(tokens):
    pipe = tiny.pipeline("sd1")
    one, two = (initial_rows(pipe, Concept(token, "dog"))["text_encoder"] for token in tokens)
    assert not torch.allclose(one, two, atol=1e-5)


def test_attached_words_are_known_and_detached_ones_are_spelled_again(pipe):
    before = {c: ids(pipe, "a <rex>, <dog>", c) for c in text_encoders(pipe)}
    with attached(pipe, trained_adapter(pipe, "<rex>", vectors=2)):
        for component in before:
            tokenizer = getattr(pipe, TOKENIZERS[component])
            assert tokenizer.tokenize("a <rex>, <REX>_1 <dog>")[:5] == ["a</w>", "<rex>", ",</w>", "<rex>_1", "<</w>"]
            assert pipe.maybe_convert_prompt("a <rex>", tokenizer) == "a <rex> <rex>_1"
    assert all(torch.equal(ids(pipe, "a <rex>, <dog>", c), i) for c, i in before.items())


def test_words_keep_their_ids_while_anything_is_attached():
    pipe = tiny.pipeline("sd1")
    first, second = (
        attach(pipe, trained_adapter(pipe, "<a>", vectors=2)),
        attach(pipe, trained_adapter(pipe, "<b>", k=1)),
    )
    id_b = pipe.tokenizer.convert_tokens_to_ids("<b>")
    first.detach()
    assert pipe.tokenizer.convert_tokens_to_ids("<b>") == id_b
    assert "<a>" not in pipe.tokenizer.tokenize("a <a>")
    third = attach(pipe, trained_adapter(pipe, "<c>", k=2))
    assert pipe.tokenizer.convert_tokens_to_ids("<c>") > id_b
    again = attach(pipe, trained_adapter(pipe, "<a>"))
    assert pipe.tokenizer.convert_tokens_to_ids("<a>") == id_b - 2
    for handle in (second, third, again):
        handle.detach()


def test_the_text_encoder_sees_no_id_beyond_its_vocabulary(pipe):
    calls = []
    for component, encoder in text_encoders(pipe).items():
        embedding_of(encoder).register_forward_pre_hook(lambda m, args: calls.append((args[0].max(), m.num_embeddings)))
        with attached(pipe, trained_adapter(pipe, vectors=3)):
            encoder(ids(pipe, "a <rex> <rex>_1 <rex>_2", component))
    assert len(calls) == len(text_encoders(pipe)) and all(top < size for top, size in calls)


def test_overlaid_rows_act_as_embeddings_would(pipe):
    """Held against a text encoder whose vocabulary really grew, in hidden states and in the pooled output."""
    adapter = fresh_adapter(pipe, vectors=2)
    for component, encoder in text_encoders(pipe).items():
        grown = copy.deepcopy(encoder)
        with attached(pipe, adapter):
            tokens = ids(pipe, "a <rex> <rex>_1 dog", component)
            output = encoder(tokens, output_hidden_states=True)
        size = embedding_of(grown).num_embeddings
        grown.resize_token_embeddings(size + 2, mean_resizing=False)
        embedding_of(grown).weight.data[size:] = adapter.tokens["<rex>"][component]
        end = getattr(pipe, TOKENIZERS[component]).eos_token_id
        grown.config.eos_token_id = getattr(grown, "text_model", grown).eos_token_id = end
        expected = grown(tokens, output_hidden_states=True)
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        assert all(torch.equal(*pair) for pair in zip(output.hidden_states, expected.hidden_states, strict=True))
        pooled = "text_embeds" if "text_embeds" in output else "pooler_output"
        assert torch.equal(output[pooled], expected[pooled])


def test_gradients_reach_the_rows_of_the_prompt_and_no_others():
    pipe = tiny.pipeline("sd1")
    one, two = fresh_adapter(pipe, "<a>", vectors=2), fresh_adapter(pipe, "<b>", k=1)
    rows = [a.tokens[t]["text_encoder"].requires_grad_() for a, t in ((one, "<a>"), (two, "<b>"))]
    pipe.text_encoder.requires_grad_(False)
    with attached(pipe, one, two):
        pipe.text_encoder(ids(pipe, "a <a> <a>_1"))[0].square().sum().backward()
    assert rows[0].grad.abs().sum(dim=1).min() > 0
    assert rows[1].grad is None and embedding_of(pipe.text_encoder).weight.grad is None


def test_a_word_of_the_base_cannot_be_a_concept():
    pipe = tiny.pipeline("sdxl")
    pipe.tokenizer_2.add_tokens(["<rex>_1"])
    with pytest.raises(TokenConflict, match="<rex> is a word of this base's tokenizer; choose another"):
        attach(pipe, trained_adapter(pipe, vectors=2))
    attach(pipe, trained_adapter(pipe, vectors=1)).detach()


def test_the_embedding_can_be_called_by_others_meanwhile():
    pipe = tiny.pipeline("sd1")
    table, words = embedding_of(pipe.text_encoder), torch.tensor([[3, 5], [7, 9]])
    expected = table(words)
    with attached(pipe, trained_adapter(pipe)):
        assert torch.equal(table(words), expected)
        pipe.text_encoder(ids(pipe, "a <rex>"))
        assert torch.equal(table(words), expected)


def test_a_copied_tokenizer_is_a_tokenizer_of_its_own(tmp_path):
    original = tiny.tokenizer()
    original.add_tokens(["<old>"])
    expected = copy.deepcopy(original)
    expected.add_tokens(["<a>", "<b>"])
    output = _with_words(original, ["<a>", "<b>"])
    assert output.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    for text in ("a <a> photo, <OLD> of dogs", "Ünïcode <b>… 🙂", "", "dog " * 40):
        for options in ({}, {"padding": "max_length", "truncation": True}):
            assert output(text, **options).input_ids == expected(text, **options).input_ids
    assert "<a>" not in original.tokenize("a <a>") and len(output) == len(original) + 2
    output.save_pretrained(tmp_path)
    assert (
        type(original).from_pretrained(tmp_path, local_files_only=True)("a <b>").input_ids == output("a <b>").input_ids
    )


def test_a_pipeline_without_its_first_text_encoder_has_words_for_the_second():
    pipe = tiny.pipeline("sdxl")
    pipe.text_encoder = pipe.tokenizer = None
    assert list(components(pipe)) == ["unet", "text_encoder_2"]
    assert initial_rows(pipe, Concept("<rex>", "dog")).keys() == {"text_encoder_2"}
    with attached(pipe, trained_adapter(pipe)):
        assert "<rex>" in pipe.tokenizer_2.tokenize("a <rex>")
