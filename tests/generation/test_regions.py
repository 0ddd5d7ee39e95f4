"""Regions: every cell follows its own prompts, and what one region's concept does no cell of another sees."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import tiny
from fusion.errors import ConfigError, GatingError
from fusion.generation.config import GenerationConfig, Region
from fusion.generation.drawing import generate
from fusion.generation.prompt_embeddings import embed_prompts
from fusion.generation.recipe import recipe_of
from fusion.generation.regions import Cover, drawing_regions
from fusion.layer_names import sees_tokens
from fusion.models.attachment import attach
from fusion.models.layer_sites import sites
from trained import attached, everywhere, moved, trained_adapter

LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
SIDE = 8  # latents of the toy pipelines


def latents(pipe, prompt, regions=(), **options):
    """Final latents (B, C, H, W), in one step of guided drawing."""
    cover = Cover(regions or [Region("", ALL)], SIDE, SIDE)
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"} | options
    generator = torch.Generator().manual_seed(0)
    if not regions:
        return pipe(prompt, generator=generator, **options).images
    with drawing_regions(pipe, cover):
        prompts = embed_prompts(pipe, GenerationConfig(prompt=prompt, regions=tuple(regions)))
        return pipe(**prompts, generator=generator, **options).images


@pytest.mark.parametrize("regions", [[Region("a dog", ALL)], [Region("a dog", LEFT), Region("a dog", RIGHT)]])
def test_regions_that_all_say_the_same_are_the_plain_prompt(pipe, regions):
    everywhere_the_same = latents(pipe, "a dog", regions)
    assert torch.allclose(everywhere_the_same, latents(pipe, "a dog"), atol=1e-5)
    assert not torch.allclose(everywhere_the_same, latents(pipe, "a bird in the snow"), atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sd2"])  # SDXL's pooled prompt stays the picture's
def test_a_region_over_all_of_it_replaces_the_prompt(family):
    pipe = tiny.pipeline(family)
    adapter = trained_adapter(pipe, targets=everywhere(pipe))
    with attached(pipe, adapter):
        replaced = latents(pipe, "a bird", [Region("a <rex>", ALL)])
        assert torch.allclose(replaced, latents(pipe, "a <rex>"), atol=1e-5)


def test_a_concept_changes_nothing_outside_its_region_at_any_layer(pipe):
    """The same input to every adapted layer, with two versions of B: equal bits in all cells of A."""
    regions = [Region("a <a>", LEFT), Region("a <b> <b>", RIGHT)]
    one = trained_adapter(pipe, "<a>", targets=everywhere(pipe))
    two = trained_adapter(pipe, "<b>", k=1, targets=everywhere(pipe))
    other = replace(two, branches=tuple(replace(b, layers=dict(b.layers)) for b in two.branches))
    inputs, cover = {}, Cover(regions, SIDE, SIDE)

    def outputs(adapter, record):
        seen, hooks = {}, []
        with attached(pipe, one, adapter):
            for name, site in sites(pipe).items():
                if name.startswith("unet.") and not sees_tokens(name):
                    module = site.module
                    if record:
                        hooks.append(
                            module.register_forward_hook(lambda m, x, y, n=name: inputs.update({n: x[0].detach()}))
                        )
                    else:
                        # Called with the input of the first round, whatever happens before this layer now.
                        hooks.append(module.register_forward_pre_hook(lambda m, x, n=name: (inputs[n],)))
                        hooks.append(module.register_forward_hook(lambda m, x, y, n=name: seen.update({n: y.detach()})))
            latents(pipe, "a dog", regions)
            for hook in hooks:
                hook.remove()
        return seen

    outputs(two, record=True)
    before = outputs(two, record=False)
    for layer in other.layers.values():
        moved(layer)
    after = outputs(other, record=False)
    changed_in_b = 0
    for name, y in before.items():
        if y.ndim == 2:  # time embeddings have no cells: they act on whole pictures
            continue
        rows, now = (t.flatten(2).transpose(1, 2) if t.ndim == 4 else t for t in (y, after[name]))
        _, left, right = cover.prompt_cells(rows.shape[1], rows.device)
        assert torch.equal(rows[:, left], now[:, left]), name
        changed_in_b += not torch.equal(rows[:, right], now[:, right])
    assert changed_in_b > 10


def test_cross_attention_of_a_region_sees_its_own_prompt_alone(pipe):
    """Another prompt for B: equal bits in A at every cross-attention, given equal inputs."""
    seen = {}
    attention = [m for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    cover = Cover([Region("", LEFT), Region("", RIGHT)], SIDE, SIDE)
    torch.manual_seed(0)
    with drawing_regions(pipe, cover):
        for module in attention:
            x = torch.randn(2, 16, module.to_q.in_features)
            states = torch.randn(2, 3 * 7, module.to_k.in_features)
            changed = states.clone()
            changed[:, 14:] += 1
            changed[:, :7] -= 1  # the picture's own prompt, which no cell follows here
            for key, given in (("before", states), ("after", changed)):
                seen[key] = module(x, encoder_hidden_states=given)
            _, left, right = cover.prompt_cells(16, x.device)
            assert torch.equal(seen["before"][:, left], seen["after"][:, left])
            assert not torch.allclose(seen["before"][:, right], seen["after"][:, right])


def test_cells_are_shared_out_at_every_level():
    overlapping = [Region("a", (0, 0, 0.75, 1)), Region("b", (0.25, 0, 1, 0.5))]
    cover = Cover(overlapping, 8, 16)
    for cells in (128, 32, 8, 2):
        places, shares = (f(cells, torch.device("cpu")) for f in (cover.prompt_cells, cover.shares))
        counted = torch.zeros(cells)
        for place in places:
            counted[place] += shares[place]
        assert torch.allclose(counted, torch.ones(cells))
    with pytest.raises(GatingError, match="has 100 cells, no level of 16x8"):
        cover.prompt_cells(100, torch.device("cpu"))


def test_a_mask_is_as_good_as_its_box():
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    boxed, painted = Region("a", LEFT), Region("a", mask=mask)
    assert all(torch.equal(boxed.cover(n, n), painted.cover(n, n)) for n in (2, 4, 8, 16))
    assert torch.equal(Region.from_json(painted.to_json()).cover(8, 8), painted.cover(8, 8))
    assert Region.from_json(boxed.to_json()) == boxed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a box or a mask"),
        ({"box": LEFT, "mask": Image.new("L", (8, 8))}, "needs a box or a mask"),
        ({"box": (0.5, 0, 0.5, 1)}, "has the box 0.5 0 0.5 1; it should be left, top, right, bottom"),
        ({"box": (0, 0, 64, 64)}, "in shares of the picture, 0 to 1"),
    ],
)
def test_senseless_regions_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Region("a dog", **options)


def test_a_region_without_a_cell_is_refused():
    with pytest.raises(ConfigError, match="'a dog' is too small: it holds none of 8x8 cells"):
        Cover([Region("a dog", (0, 0, 0.05, 0.05))], SIDE, SIDE)


def test_processors_come_back_and_foreign_ones_are_refused(pipe):
    cover = Cover([Region("a", LEFT)], SIDE, SIDE)
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), drawing_regions(pipe, cover):
        raise RuntimeError("stop")
    assert pipe.unet.attn_processors == before

    class Foreign:
        pass

    next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2")).processor = Foreign()
    with pytest.raises(ConfigError, match="Foreign attention"), drawing_regions(pipe, cover):
        pass


@pytest.mark.slow
def test_a_picture_of_regions_is_repeated_by_its_recipe(pipe, tmp_path):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    regions = [Region("a <rex>", LEFT), Region("a bird", mask=mask)]
    adapter = trained_adapter(pipe)
    plain = GenerationConfig(prompt="a dog", num_inference_steps=2, num_images=2, negative_prompt="a cat")
    first = generate(pipe, plain.updated({"regions": regions}), [adapter])[1]
    recipe = recipe_of(first.save(tmp_path / "a.png"))
    again = generate(pipe, recipe.config, [adapter])[1]
    assert again.image.tobytes() == first.image.tobytes()
    assert generate(pipe, plain, [adapter])[1].image.tobytes() != first.image.tobytes()


@pytest.mark.slow
def test_a_region_of_a_token_alone_follows_the_picture_with_others_by_their_nouns(pipe):
    adapters = [trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1)]
    config = GenerationConfig(prompt="a <a> and <b> in the snow", num_inference_steps=1)
    regions = [Region("<a>", LEFT), Region("a cat", (0.5, 0, 1, 0.5)), Region("<b> <a>", (0.5, 0.5, 1, 1))]
    short = generate(pipe, config.updated({"regions": regions}), adapters)[0]
    prompts = ["a <a> and dog in the snow", "a cat", "a <a> and <b> in the snow"]
    assert [region.prompt for region in short.recipe.config.regions] == prompts
    long = [replace(region, prompt=prompt) for region, prompt in zip(regions, prompts, strict=True)]
    again = generate(pipe, config.updated({"regions": long}), adapters)[0]
    assert again.image.tobytes() == short.image.tobytes()
    (alone,) = generate(pipe, config.updated({"prompt": "a bird", "regions": [Region("<a>", LEFT)]}), adapters)
    assert alone.recipe.config.regions[0].prompt == "<a>"


def test_without_regions_nothing_is_different_afterwards(pipe):
    adapter = trained_adapter(pipe, targets=everywhere(pipe))
    with attach(pipe, adapter):
        before = latents(pipe, "a <rex>")
        latents(pipe, "a dog", [Region("a <rex>", LEFT)])
        assert torch.equal(latents(pipe, "a <rex>"), before)
