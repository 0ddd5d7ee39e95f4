"""LoRAs bound to words in the studio, and regions that the base found, edited and given back."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fusion
from fusion_studio.interface import library_choices
from fusion_studio.regions import as_regions, regions_of
from fusion_studio.tabs import Controls, binding, draw, history

BLOCK = "mid_block_attentions_0_transformer_blocks_0"
INPUTS = {f"{BLOCK}_attn1_to_q": 64, f"{BLOCK}_attn2_to_k": 32}  # the first sees no tokens


def lora(session, folder, name, seed):
    """A plain LoRA by another program, uploaded."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer, inputs in INPUTS.items():
        tensors[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(64, 2, generator=generator)
    save_file(tensors, folder / f"{name}.safetensors")
    return binding.import_lora(session, str(folder / f"{name}.safetensors"))


def drawn(session, picks, prompt, **settings):
    *_, last = draw.draw_pictures(session, [], Controls(picks, prompt, seed=3, new_seed=False, **settings))
    return last


def test_a_lora_is_bound_and_its_regions_are_edited(session, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(draw, "warn", warnings.append)
    chosen = [lora(session, tmp_path, name, seed) for seed, name in enumerate(("knight", "tom"))]
    assert [choice.value for choice in chosen] == ["knight", "tom"]
    picks = {"picked": {"tom": 0.5}}
    for name, word in (("knight", "the  Knight"), ("tom", "<tom>")):
        picks, _, cli = binding.bind_lora(session, name, word, picks)
    assert picks == {"picked": {"the-knight": 1.0, "tom-2": 1.0}} and "fuse --bind '<tom>=" in cli.value
    labels = [choice["label"] for choice in library_choices(session, picks)[0]["choices"]]
    assert {"<the-knight>", "<tom>"} <= set(labels) and binding.lora_choices(session).value in ("knight", "tom")
    with pytest.raises(fusion.FusionError, match="already has <tom>"):
        binding.bind_lora(session, "knight", "<tom>", picks)
    with pytest.raises(fusion.FusionError, match="Choose a LoRA"):
        binding.bind_lora(session, None, "<tim>", picks)

    stage, _, entries, at, cli = drawn(session, picks, "the knight beside <tom>")
    assert not warnings and " --region auto" in cli.value
    value, _ = history.regions_of_entry(session, entries, at, {"tokens": ["<tom>"]})
    assert value["tokens"] == ["<tom>"] and all("mask" in region for region in value["regions"])
    found = fusion.recipe_of(stage).config.regions
    assert [np.asarray(r.mask).tolist() for r in as_regions(regions_of(value))] == [
        np.asarray(r.mask).tolist() for r in found
    ]
    again, *_ = drawn(session, picks, "the knight beside <tom>", regions=value)
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(stage)))
    base, *_ = drawn(session, {"picked": {}}, "a cat")
    silent, _, entries, *_ = drawn(session, picks, "a cat")
    assert np.array_equal(np.asarray(Image.open(base)), np.asarray(Image.open(silent)))
    assert warnings == ["The prompt does not mention the Knight or <tom>, so nothing of that is drawn."]
    with pytest.raises(fusion.FusionError, match="no regions"):
        history.regions_of_entry(session, entries, 0, None)
