"""Several prompts in one batch, each with its own concepts, exact as alone at that batch size."""

import numpy as np
import pytest

import fusion
import tiny
from fusion.cli import arguments
from fusion.cli.generate import UsageError, configure, with_loras
from fusion.errors import ConfigError
from fusion.generation.config import GenerationConfig, Region
from fusion.generation.recipe import Recipe
from trained import trained_adapter

SETTINGS = {"num_inference_steps": 1, "prompt_weighting": "a1111"}


def pixels(pictures):
    return [np.asarray(picture.image) for picture in pictures]


def test_every_prompt_of_a_batch_is_drawn_as_alone(pipe, tmp_path):
    rex, tom = trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)
    prompts = ["a (<rex>:1.2)", "a dog", "a <tom>"]
    config = GenerationConfig(prompt=prompts, seed=4, **SETTINGS)
    pictures = fusion.generate(pipe, config, [rex, tom], strengths=[0.5, 1.5])
    alone = [([rex], [0.5]), ([], None), ([tom], [1.5])]
    for number, (prompt, (adapters, strengths)) in enumerate(zip(prompts, alone, strict=True)):
        others = ["a dog"] * 3
        others[number] = prompt
        single = GenerationConfig(prompt=others, seed=4, **SETTINGS)
        expected = fusion.generate(pipe, single, adapters, strengths=strengths)[number]
        assert np.array_equal(pictures[number].image, expected.image)
        recipe = fusion.recipe_of(pictures[number].save(tmp_path / f"{number}.png"))
        assert (recipe.picture_prompt, recipe.picture_seed, recipe.index) == (prompt, 4 + number, number)
        assert recipe.parameters().startswith(prompt)
    again = fusion.generate(pipe, recipe.config, [rex, tom], strengths=[0.5, 1.5])
    assert all(map(np.array_equal, pixels(again), pixels(pictures)))


def test_prompts_of_other_lengths_do_not_change_a_picture():
    pipe = tiny.pipeline("sd1")
    rex = trained_adapter(pipe, "<rex>")
    long = f"{'dog ' * 20} <rex>"
    mixed = fusion.generate(pipe, GenerationConfig(prompt=["a <rex>", long, "a cat"], **SETTINGS), [rex])
    short = fusion.generate(pipe, GenerationConfig(prompt=["a <rex>", "a cat"], **SETTINGS), [rex])
    other = fusion.generate(pipe, GenerationConfig(prompt=long, seed=1, **SETTINGS), [rex])
    assert [picture.recipe.picture_seed for picture in mixed] == [0, 1, 2]
    assert np.array_equal(mixed[0].image, short[0].image) and np.array_equal(mixed[1].image, other[0].image)


def test_pictures_of_a_prompt_stand_together_and_limits_hold():
    config = GenerationConfig(prompt=["a", "b"], num_images=2, seed=7)
    assert config.picture_prompts() == ["a", "a", "b", "b"] and config.seeds() == [7, 8, 9, 10]
    assert GenerationConfig(prompt="a").prompts == ("a",)
    assert Recipe.from_json(Recipe(config=config, base="x", index=3).to_json()).picture_prompt == "b"
    for wrong in ({"prompt": []}, {"prompt": ["a"] * 257}, {"prompt": ["x" * 10_001]}, {"num_images": 129}):
        with pytest.raises(ConfigError, match="limit is 256, of up to 10000 letters"):
            GenerationConfig.model_validate({"prompt": ["a", "b"], **wrong})
    with pytest.raises(ConfigError, match="Regions are those of one prompt, and there are 2"):
        GenerationConfig(prompt=["a", "b"], regions=(Region("c", (0, 0, 1, 1)),))


def test_a_list_of_prompts_and_regions_that_are_found():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    pictures = fusion.generate(
        pipe,
        GenerationConfig(prompt=["a <rex>", "a <rex> and a <tom>"], regions="auto", num_inference_steps=4),
        adapters,
    )
    assert pictures[0].recipe.config.regions == ()
    assert [picture.recipe.picture_prompt for picture in pictures] == ["a <rex>", "a <rex> and a <tom>"]


def test_flags_of_several_prompts_and_of_a_picture_among_them():
    flags = ["--prompt", "a dog", "--prompt", "a cat", "--seed", "3"]
    config = configure(arguments("generate", flags), None)
    assert config == GenerationConfig(prompt=["a dog", "a cat"], seed=3, prompt_weighting="a1111")
    assert configure(arguments("generate", flags[:2]), None).prompt == "a dog"
    recipe = Recipe(config=config, base="pocket", index=1)
    assert configure(arguments("generate", ["--from", "a.png"]), recipe) == config
    changed = configure(arguments("generate", ["--from", "a.png", "--num_images", "2"]), recipe)
    assert (changed.prompt, changed.seed, changed.num_images) == ("a cat", 4, 2)
    old = Recipe.from_json({"prompt": "a (dog)", "base": "pocket"})
    assert configure(arguments("generate", ["--from", "a.png"]), old).prompt_weighting == "none"


def test_loras_in_a_prompt_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("loras/style/ink.safetensors", "out/rex.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    config = GenerationConfig(prompt="a <rex> <lora:ink:0.8>, (a cat:1.2) <lora:rex>", prompt_weighting="a1111")
    text, files = with_loras(config, tmp_path / "loras")
    assert text.prompt == "a <rex>, (a cat:1.2)" and [*files.values()] == [0.8, 1]
    assert [path.name for path in files] == ["ink.safetensors", "rex.safetensors"]
    assert with_loras(config.updated({"prompt_weighting": "none"}), None)[1] == {}
    with pytest.raises(UsageError, match=r"there is no ink.safetensors in 'out'; name its folder with --lora_dir"):
        with_loras(config, None)
    with pytest.raises(UsageError, match=r"there is no imk.safetensors; did you mean 'ink'\?$"):
        with_loras(config.updated({"prompt": "<lora:imk>"}), tmp_path / "loras")
    both = config.updated({"prompt": ["<lora:rex:1>", "<lora:rex:0.5>"]})
    with pytest.raises(UsageError, match=r"two strengths, 1 and 0\.5"):
        with_loras(both, None)
