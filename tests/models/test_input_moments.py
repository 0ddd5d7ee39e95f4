"""Recorded moments are those of the inputs that the layers really get, distinguished by where each concept acts."""

import pytest
import torch

import tiny
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts
from fusion.models.input_moments import record_moments
from fusion.models.layer_sites import sites
from trained import draw, everywhere, trained_adapter

CONCEPT_FREE = ("a robot", "a cat in the snow")
QUICK = {"steps": 2, "concept_free": CONCEPT_FREE}


def inputs_of(pipe, layer, prompts, *adapters):
    """Inputs of one text encoder layer, (prompts, T, I)."""
    inputs = []
    hook = sites(pipe)[layer].module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().double()))
    with torch.no_grad():
        encode_prompts(pipe, prompts)
    hook.remove()
    return torch.cat(inputs)


def text_layer(adapter):
    return next(name for name in adapter.layer_names if name.startswith("text_encoder.encoder.layers.1"))


def test_an_ungated_concept_owns_all_inputs_of_its_prompts(pipe):
    adapter = trained_adapter(pipe, gated=False)
    layer, prompts = text_layer(adapter), ["a <rex>", "a photo of a <rex>"]
    recorded = record_moments(pipe, [adapter], prompts=["a {token}", "a photo of a {token}"], **QUICK)[0].layers[layer]
    with attach(pipe, adapter):
        own = inputs_of(pipe, layer, prompts).flatten(0, 1)
    with attach(pipe, adapter) as handle:
        handle.strength("<rex>", 0.0)
        free = inputs_of(pipe, layer, [*CONCEPT_FREE, "a dog"]).flatten(0, 1)
    torch.testing.assert_close(recorded.own, own.T @ own / len(own), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(recorded.free, free.T @ free / len(free), rtol=1e-5, atol=1e-9)
    assert recorded.floor == pytest.approx(float(torch.cat([own, free]).square().mean()), rel=1e-5)


def test_a_gated_concept_owns_the_rows_of_its_token_alone():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, vectors=2)
    layer = text_layer(adapter)
    recorded = record_moments(pipe, [adapter], prompts=["a {token}"], **QUICK)[0].layers[layer]
    with attach(pipe, adapter):
        inputs = inputs_of(pipe, layer, ["a <rex>"])[0]
    own = inputs[2:4]  # after the beginning and "a"
    torch.testing.assert_close(recorded.own, own.T @ own / 2, rtol=1e-5, atol=1e-9)


def test_every_layer_is_recorded_and_layers_with_one_input_share_a_moment(pipe):
    adapter = trained_adapter(pipe, gated=False, targets=everywhere(pipe))
    moments = record_moments(pipe, [adapter], **QUICK)[0].layers
    silent = {name for name in adapter.layer_names if name not in moments}
    assert all("text_projection" in name or "layers.1" in name for name in silent)
    for name, moment in moments.items():
        width = adapter.layers[name].delta().shape[1]
        assert moment.own.shape == moment.free.shape == (width, width) and moment.floor > 0
        if name.endswith("to_q") and "attn1" in name:
            assert moments[name.replace("to_q", "to_k")] is moment


def test_layers_that_only_another_adapter_changes_are_to_be_left_alone():
    pipe = tiny.pipeline("sd1")
    keys = trained_adapter(pipe, targets=["unet.attn2.to_k"])
    queries = trained_adapter(pipe, "<tom>", targets=["unet.attn2.to_q"], gated=False)
    first, second = record_moments(pipe, [keys, queries], **QUICK)
    assert first.layers.keys() == second.layers.keys()
    for name in queries.layer_names:
        assert not first.layers[name].own.any() and first.layers[name].free.any()


def test_an_adapter_without_a_word_acts_everywhere_unless_it_is_given_prompts():
    pipe = tiny.pipeline("sd1")
    lora = wordless(trained_adapter(pipe, gated=False))
    (moments,) = record_moments(pipe, [lora], **QUICK)
    assert moments.everywhere and not any(moment.free.any() for moment in moments.layers.values())
    (prompted,) = record_moments(pipe, [lora], prompts=["a robot"], **QUICK)
    assert not prompted.everywhere and all(moment.free.any() for moment in prompted.layers.values())


def test_recording_leaves_the_pipeline_as_found_and_is_repeatable(pipe):
    adapter = trained_adapter(pipe)
    before, modules = draw(pipe), {name: site.module for name, site in sites(pipe).items()}
    one, two = (record_moments(pipe, [adapter], **QUICK)[0].layers for _ in range(2))
    assert {name: site.module for name, site in sites(pipe).items()} == modules
    assert not any(module._forward_pre_hooks for module in modules.values())
    assert torch.equal(draw(pipe), before)
    assert all(torch.equal(one[n].own, two[n].own) and torch.equal(one[n].free, two[n].free) for n in one)


def wordless(adapter):
    from dataclasses import replace

    return replace(adapter, info=replace(adapter.info, concepts=()), tokens={})
