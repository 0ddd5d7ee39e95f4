"""Regions found by the UNet: every concept where it changes the prediction, and nothing else about the drawing."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import fusion
import tiny
from fusion.generation.auto_regions import Midway, changes, draw_midway, regions_of
from fusion.generation.concept_cells import by_nouns, cells_by_concept
from fusion.generation.config import GenerationConfig
from fusion.generation.pipeline_call import call_pipeline
from fusion.generation.schedulers import SCHEDULERS
from trained import attached, fresh_adapter, trained_adapter


def test_prompts_by_nouns():
    nouns = {"<rex>": "dog", "<tom>": "cat"}
    assert by_nouns("a <rex> beside a <tom>", nouns) == "a dog beside a cat"
    assert by_nouns("a <rex> beside a <tom>", nouns, ["<tom>"]) == "a dog beside a <tom>"


@pytest.mark.parametrize("side", [16, 64])
def test_every_concept_gets_the_cells_that_it_changes_most(side):
    part = side // 4
    maps = torch.rand(2, side, side) * 1e-3
    maps[0, part : 2 * part, :part] = 5.0  # one changes a hundred times as much as the other
    maps[1, part : 2 * part, -part:] = 0.05
    one, two = cells_by_concept(maps)
    assert not (one & two).any()
    assert one[part : 2 * part, :part].all() and two[part : 2 * part, -part:].all()
    assert one.sum() < 2.5 * part**2 and two.sum() < 2.5 * part**2  # and little around it


def test_overlapping_concepts_share_no_cell_and_scale_does_not_matter():
    maps = torch.rand(3, 16, 16)
    found = cells_by_concept(maps)
    assert found.sum(dim=0).max() == 1 and found.any(dim=(1, 2)).all()
    assert torch.equal(found, cells_by_concept(maps * torch.tensor([1.0, 100.0, 0.01])[:, None, None]))


def test_a_concept_that_changes_nothing_has_no_place_and_is_named(caplog):
    maps = torch.zeros(2, 16, 16)
    maps[0, :4, :4] = 1.0
    found = regions_of(cells_by_concept(maps), {"<rex>": "dog", "<tom>": "cat"})
    assert [region.prompt for region in found] == ["<rex>"] and found[0].cover(16, 16)[:4, :4].all()
    assert "<tom>" in caplog.text


def input_of_call(pipe, number, draw):
    """What the UNet is given at its call `number`, by stopping there."""
    calls = []

    def watch(_unet, args, kwargs):
        calls.append((args[0], args[1]))
        if len(calls) == number:
            raise StopIteration

    hook = pipe.unet.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with pytest.raises(StopIteration):
            draw()
    finally:
        hook.remove()
    return calls[-1][0][:1], calls[-1][1]


def sized(**settings):
    return GenerationConfig(prompt="a dog", width=16, height=16, **settings)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_midway_is_what_the_unet_is_given_after_a_quarter_of_the_steps(name):
    pipe, config = tiny.pipeline("sd1"), sized(num_inference_steps=9, scheduler=name)
    latents, timestep = input_of_call(pipe, 3, lambda: call_pipeline(pipe, config))
    midway = draw_midway(pipe, config)
    assert torch.equal(midway.latents, latents) and midway.timestep == timestep


@pytest.mark.parametrize(
    ("steps", "strength", "call"),
    [(8, 0.6, 3), (8, 1.0, 3), (20, 0.2, 4), (20, 0.05, 4), (1, 0.5, 3)],
)
def test_midway_of_a_picture_from_a_picture(family, steps, strength, call):
    """A quarter of the steps, or before the last one, where the picture to start from leaves so few; (20, 0.05) would
    be a single step: 80 are taken, of which four are left."""
    pipe, start = tiny.pipeline(family), Image.new("RGB", (16, 16), "red")
    config = sized(num_inference_steps=steps, image_strength=strength)
    enough = config.updated({"num_inference_steps": max(steps, math.ceil(4 / strength))})
    latents, timestep = input_of_call(pipe, call, lambda: call_pipeline(pipe, enough, start))
    midway = draw_midway(pipe, config, start)
    assert torch.equal(midway.latents, latents) and midway.timestep == timestep


def test_changes_are_of_each_concept_alone(pipe):
    one, two = trained_adapter(pipe, "<rex>"), fresh_adapter(pipe, "<tom>", k=1)  # untrained: says the same as its noun
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    midway = Midway(latents, torch.tensor(500))
    with attached(pipe, one, two):
        maps = changes(pipe, midway, GenerationConfig(prompt="a <rex> and a <tom>"), {"<rex>": "dog", "<tom>": "dog"})
    assert maps.shape == (2, 8, 8) and maps[1].max() < 1e-5 * maps[0].max()


@pytest.mark.slow
def test_pictures_with_found_regions_repeat_from_their_recipes(pipe):
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    config = GenerationConfig(prompt="a <rex> and a <tom>", num_inference_steps=4, seed=5, num_images=2)
    found = fusion.generate(pipe, config.updated({"regions": "auto"}), adapters)
    plain = fusion.generate(pipe, config, adapters)
    for k, picture in enumerate(found):
        recipe = picture.recipe
        assert [region.prompt for region in recipe.config.regions] == ["a <rex> and a dog", "a dog and a <tom>"]
        assert (recipe.config.seed, recipe.index, recipe.config.num_images) == (5 + k, 0, 1)
        (again,) = fusion.generate(pipe, recipe.config, adapters)
        assert np.array_equal(np.asarray(again.image), np.asarray(picture.image))
        assert not np.array_equal(np.asarray(plain[k].image), np.asarray(picture.image))


def test_a_prompt_of_one_concept_is_drawn_as_ever():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    config = GenerationConfig(prompt="a <rex>", num_inference_steps=2)
    auto, plain = (fusion.generate(pipe, c, adapters)[0] for c in (config.updated({"regions": "auto"}), config))
    assert np.array_equal(np.asarray(auto.image), np.asarray(plain.image)) and auto.recipe == plain.recipe
