"""The quiet loss: its prompts hold no token, its value is what the inputs say, and it makes ungated adapters quiet."""

from dataclasses import replace

import pytest
import torch

import fusion
import tiny
from fusion.adapters.layer_stacks import LayerStacks
from fusion.evaluation.output_error import measure_output_errors
from fusion.models.attachment import attach
from fusion.models.input_moments import CONCEPT_FREE, record_base
from fusion.models.layer_sites import matrix, sites
from fusion.training.quiet_loss import MAX_CAPTIONS, QuietLoss, decoy_words, quiet_prompts
from trained import draw, trained_adapter

TOKEN = "<dog>"


def config(**settings):
    base = {"token": TOKEN, "noun": "dog", "instance_data_dir": "/pictures", "quiet_loss_weight": 2.0}
    return fusion.TrainingConfig(**base | settings)


def test_prompts_are_the_captions_with_other_words_and_never_the_token():
    captions = [f"a <dog> in scene {i}" for i in range(40)]
    prompts = quiet_prompts(config(), captions, ["<decoy>"])
    assert set(CONCEPT_FREE) < set(prompts) and not [p for p in prompts if TOKEN in p]
    for kind in ("a dog in scene", "a cat in scene", "a <decoy> in scene"):
        assert any(prompt.startswith(kind) for prompt in prompts)
    assert len(prompts) <= len(CONCEPT_FREE) + 4 * MAX_CAPTIONS
    assert quiet_prompts(config(noun=""), ["a {token}"], ["<decoy>"])[-1] == "a <decoy>"


@pytest.mark.parametrize("gated", [True, False])
def test_it_is_the_mean_drift_of_all_layers_on_these_inputs_gates_or_none(gated):
    pipe, settings = tiny.pipeline("sd1"), config()
    adapter = trained_adapter(pipe, TOKEN, gated=gated)
    silent = replace(adapter, branches=(replace(adapter.branches[0], strength=0.0),))
    side, batch = pipe.unet.config.sample_size, min(4, settings.train_batch_size)
    with attach(pipe, silent):
        stacks = LayerStacks(silent.layers.values())
        quiet_loss = QuietLoss(pipe, settings, silent, sites(pipe), ["a {token}"], side * pipe.vae_scale_factor, stacks)
        words = decoy_words(settings, adapter)
        with attach(pipe, words):
            tokens = [concept.token for concept in words.info.concepts]
            prompts = quiet_prompts(settings, ["a {token}"], tokens)
            met = record_base(pipe, adapter.layer_names, prompts, steps=4, side=side, batch=batch)
    ratios = []
    for name, delta in adapter.deltas().items():
        change, weight = delta.dense().double(), matrix(sites(pipe)[name]).double()
        free = met[name].free
        ratios.append(float((change @ free * change).sum() / (weight @ free * weight).sum()))
    with stacks.computed():
        assert float(quiet_loss().detach()) == pytest.approx(2 * sum(ratios) / len(ratios), rel=1e-3)


def test_decoys_are_as_large_as_the_concept_and_leave_with_their_attachment():
    pipe = tiny.pipeline("sdxl")
    adapter = trained_adapter(pipe, TOKEN, vectors=2)
    words, before = decoy_words(config(num_vectors=2), adapter), draw(pipe)
    assert words.tokens.keys() == {concept.token for concept in words.info.concepts}
    for component, own in adapter.tokens[TOKEN].items():
        rows = torch.stack([rows[component] for rows in words.tokens.values()])
        assert rows.shape[1:] == own.shape
        assert float(rows.square().mean().sqrt()) == pytest.approx(float(own.square().mean().sqrt()), rel=0.2)
    with attach(pipe, words):
        draw(pipe, f"a {words.info.concepts[0].token}")
    assert torch.equal(draw(pipe), before)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("gating", ["tokens", "none"])
def test_a_quiet_adapter_drifts_less_when_its_gates_are_open(gating, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    drift = {}
    for weight in (0.0, 100.0):
        pipe, out = tiny.pipeline("sd1"), tmp_path / f"out-{weight}"
        settings = {"instance_data_dir": tmp_path / "pictures", "output_dir": out, "checkpointing_steps": 0}
        rates = {"learning_rate": 1e-2, "text_encoder_lr": 1e-2, "token_lr": 1e-2, "rank": 4, "max_train_steps": 15}
        *_, last = fusion.train(pipe, config(quiet_loss_weight=weight, gating=gating, **settings, **rates))
        (found,) = measure_output_errors(
            pipe, [last.adapter], ("none",), prompts=["a {token}"], concept_free=["a robot", "a bird"], seed=0
        )
        drift[weight] = found.drift
    assert drift[100.0] < 0.5 * drift[0.0]
