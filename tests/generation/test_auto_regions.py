"""Regions found by the UNet: every concept where it changes the prediction, and nothing else about the drawing."""

import numpy as np
import pytest
import torch

import fusion
import tiny
from fusion.generation.auto_regions import Looked, by_nouns, changes, looking, places, regions_of
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
    one, two = places(maps)
    assert not (one & two).any()
    assert one[part : 2 * part, :part].all() and two[part : 2 * part, -part:].all()
    assert one.sum() < 2.5 * part**2 and two.sum() < 2.5 * part**2  # and little around it


def test_overlapping_concepts_share_no_cell_and_scale_does_not_matter():
    maps = torch.rand(3, 16, 16)
    found = places(maps)
    assert found.sum(dim=0).max() == 1 and found.any(dim=(1, 2)).all()
    assert torch.equal(found, places(maps * torch.tensor([1.0, 100.0, 0.01])[:, None, None]))


def test_a_concept_that_changes_nothing_has_no_place_and_is_named(caplog):
    maps = torch.zeros(2, 16, 16)
    maps[0, :4, :4] = 1.0
    found = regions_of(places(maps), {"<rex>": "dog", "<tom>": "cat"})
    assert [region.prompt for region in found] == ["<rex>"] and found[0].cover(16, 16)[:4, :4].all()
    assert "<tom>" in caplog.text


def test_looking_stops_a_quarter_of_the_way_and_leaves_no_hook():
    pipe, calls = tiny.pipeline("sd1"), []
    count = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(Looked) as seen, looking(pipe.unet, 8):
        pipe("a dog", num_inference_steps=8)
    count.remove()
    assert len(calls) == 3 and seen.value.latents.shape == (1, 4, 8, 8)
    assert seen.value.timestep == pipe.scheduler.timesteps[2] and not pipe.unet._forward_pre_hooks


def test_changes_are_of_each_concept_alone(pipe):
    one, two = trained_adapter(pipe, "<rex>"), fresh_adapter(pipe, "<tom>", k=1)  # untrained: says the same as its noun
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with attached(pipe, one, two):
        maps = changes(pipe, Looked(latents, 500), "a <rex> and a <tom>", {"<rex>": "dog", "<tom>": "dog"})
    assert maps.shape == (2, 8, 8) and maps[1].max() < 1e-5 * maps[0].max()


@pytest.mark.slow
def test_pictures_with_found_regions_repeat_from_their_recipes(pipe):
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    options = {"adapters": adapters, "steps": 4, "seed": 5}
    found = fusion.generate(pipe, "a <rex> and a <tom>", regions="auto", batch=2, **options)
    plain = fusion.generate(pipe, "a <rex> and a <tom>", batch=2, **options)
    for k, picture in enumerate(found):
        recipe = picture.recipe
        assert [region.prompt for region in recipe.regions] == ["a <rex> and a dog", "a dog and a <tom>"]
        assert (recipe.seed, recipe.index, recipe.batch) == (5 + k, 0, 1)
        (again,) = fusion.generate(
            pipe, recipe.prompt, adapters=adapters, steps=4, seed=recipe.seed, regions=recipe.regions
        )
        assert np.array_equal(np.asarray(again.image), np.asarray(picture.image))
        assert not np.array_equal(np.asarray(plain[k].image), np.asarray(picture.image))


def test_a_prompt_of_one_concept_is_drawn_as_ever():
    pipe = tiny.pipeline("sd1")
    options = {"adapters": [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)], "steps": 2}
    auto, plain = (fusion.generate(pipe, "a <rex>", **options, **more)[0] for more in ({"regions": "auto"}, {}))
    assert np.array_equal(np.asarray(auto.image), np.asarray(plain.image)) and auto.recipe == plain.recipe
