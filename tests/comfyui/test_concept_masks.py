"""The nodes that find masks and report on adapters, against the command line's functions."""

from dataclasses import replace

import pytest
import torch
from comfy_checks import encode, loaded

import fusion
from fusion.generation.auto_regions import find_regions
from fusion.generation.config import GenerationConfig
from trained import attached, trained_adapter

pytestmark = pytest.mark.filterwarnings("default")
PROMPT = "a <rex> beside a <tom>"


@pytest.fixture
def pair(spectral, folders, toys):
    toy = toys("sd1")
    adapters = [trained_adapter(toy.pipe, t, k=k, scale=0.2) for k, t in enumerate(("<rex>", "<tom>"))]
    return toy, adapters, *loaded(spectral, folders, toy, *adapters)


def test_masks_are_the_regions_that_auto_finds(comfyui, spectral, pair):
    """Of one seed, steps and guidance; ComfyUI's first noise is 0.2 % larger than diffusers'."""
    toy, adapters, model, clip = pair
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    negative = encode(comfyui, clip, "")
    find = spectral["ConceptMasks"]().find
    with torch.inference_mode():
        masks = find(model, clip, PROMPT, negative, latent, 1, 8, 4.0, "euler", "normal")
        swapped = find(model, clip, "a <tom> beside a <Rex>", negative, latent, 1, 8, 4.0, "euler", "normal")
    settings = {"num_inference_steps": 8, "guidance_scale": 4.0, "scheduler": "euler", "seed": 1}
    config = GenerationConfig(prompt=PROMPT, width=16, height=16, **settings)  # the toy's pixels are cells
    with attached(toy.pipe, *adapters):
        regions = find_regions(toy.pipe, config, None, {"<rex>": "dog", "<tom>": "dog"})
    assert [mask.shape for mask in masks] == [(1, 128, 128)] * 4
    assert not (masks[0] * masks[1]).any() and not masks[2].any() and not masks[3].any()
    for mask, region in zip(masks[:2], regions, strict=True):
        cells = mask[0, ::8, ::8].bool()
        assert 20 < cells.sum() < 200
        assert (cells == region.cover(16, 16)).float().mean() > 0.97
    assert (swapped[0] != masks[0]).any()


def test_the_masks_of_a_phrase_are_those_of_its_token(comfyui, spectral, folders, toys):
    """The noun of a bound LoRA is its phrase, which must not bind it where the noun stands for the concept."""
    toy = toys("sd1")
    lora = trained_adapter(toy.pipe, "<x>", kind="lora", k=1, gated=False, scale=0.2)
    fusion.save(replace(lora, tokens={}, info=replace(lora.info, concepts=())), folders / "lora.safetensors")
    before = loaded(spectral, folders, toy, trained_adapter(toy.pipe, "<rex>", scale=0.2))
    masks = []
    for word in ("the knight", "<the-knight>"):
        model, clip = spectral["BindLoraToWord"]().bind(*before, "lora.safetensors", word, 1.0, 1.0)
        settings = {"samples": torch.zeros(1, 4, 8, 8)}, 1, 4, 4.0, "euler", "normal"
        with torch.inference_mode():
            negative = encode(comfyui, clip, "")
            masks.append(spectral["ConceptMasks"]().find(model, clip, f"a <rex> and {word}", negative, *settings))
    assert masks[0][1].any()
    assert all(map(torch.equal, *masks))


def test_masks_need_two_concepts(comfyui, spectral, pair):
    *_, model, clip = pair
    with pytest.raises(Exception, match="2 to 4 concepts; the prompt has 1: <rex>"):
        spectral["ConceptMasks"]().find(
            model, clip, "a <rex>", encode(comfyui, clip, ""), {"samples": torch.zeros(1, 4, 8, 8)}, 1, 8, 4.0, "euler",
            "normal",
        )  # fmt: skip


def test_the_report_has_the_figures_of_compatibility(spectral, pair):
    toy, adapters, _, clip = pair
    report = fusion.compatibility(adapters)
    text = spectral["AdapterCompatibility"]().report(clip)["result"][0]
    assert text.splitlines()[0] == f"{report.verdict}: {report.sentence}"
    assert f"tom, rex: cosine {report.interference.cosine[1][0]:+.4f}" in text
    with pytest.raises(Exception, match="This CLIP has no adapters"):
        spectral["AdapterCompatibility"]().report(toy.clip)
