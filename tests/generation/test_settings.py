"""A picture's settings stand once: every one is a flag, a key of [generation], and comes back from a recipe."""

import json
import random
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import fusion
import tiny
from fusion.cli import arguments, main
from fusion.cli.generate import configure
from fusion.config import settings_of
from fusion.errors import ConfigError, FormatError
from fusion.generation.config import GenerationConfig, Region
from fusion.generation.recipe import RECIPE_KEY, Recipe, UsedAdapter, recipe_of
from trained import trained_adapter

MASK = Image.new("L", (8, 8))
MASK.paste(255, (4, 0, 8, 8))
BOX = Region("a <rex>", (0.0, 0.0, 0.5, 1.0))
# A value other than the default for every field.
EVERY = {
    "prompt": "a <rex>", "negative_prompt": "snow", "regions": (BOX, Region("a bird", mask=MASK)), "seed": 7,
    "num_images": 2, "num_inference_steps": 3, "guidance_scale": 2.5, "guidance_rescale": 0.5, "scheduler": "euler",
    "prompt_weighting": "compel", "width": 64, "height": 32, "image_strength": 0.25, "clip_skip": 1, "gating": "none",
}  # fmt: skip
# As fusion 0.1 wrote it, before settings had the names of diffusers.
FORMER = json.loads(
    """{"prompt": "a dog", "negative_prompt": "a cat", "seed": 5, "index": 1, "batch": 2, "steps": 2,
    "guidance_scale": 7.5, "guidance_rescale": 0.0, "scheduler": "euler", "width": 16, "height": 16, "base": "unnamed",
    "adapters": [{"name": "rex", "digest": "e66692026d51", "strength": 0.7, "tokens": ["<rex>"], "file": null}],
    "gating": null, "image": null, "image_strength": null, "regions": [{"prompt": "<rex>", "box": [0, 0, 0.5, 1]},
    {"prompt": "a bird", "mask": "PAINTED"}]}""".replace(
        "PAINTED", "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQAAAADsdIMmAAAADUlEQVR4nGPgZ2JAhgABYQAeGInhwAAAAABJRU5ErkJggg=="
    )
)


def png(path, text: str):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(RECIPE_KEY, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_every_setting_comes_back_from_a_recipe(tmp_path):
    config = GenerationConfig(**EVERY)
    assert EVERY.keys() == GenerationConfig.model_fields.keys() == config.model_fields_set
    assert all(getattr(config, name) != field.default for name, field in GenerationConfig.model_fields.items())
    used = UsedAdapter(name="rex", digest="00", strength=0.5, tokens=("<rex>",), file="rex.safetensors")
    recipe = Recipe(config=config, base="pocket", adapters=(used,), index=1, image="ff")
    again = recipe_of(png(tmp_path / "a.png", json.dumps(recipe.to_json())))
    assert again == recipe and again.picture_seed == 8
    assert again.config.model_fields_set == config.model_fields_set


def test_every_setting_is_a_flag_and_a_key_of_the_bases_defaults():
    words = ["--prompt", "a <rex>", "--region", "a <rex>: 0 0 0.5 1"]
    for setting in settings_of(GenerationConfig):
        if setting.name not in ("prompt", "regions"):
            words += [f"--{setting.name}", str(EVERY[setting.name])]
            for alias in setting.aliases:
                flags = ["--prompt", "x", f"--{alias}", str(EVERY[setting.name])]
                assert getattr(configure(arguments("generate", flags), None), setting.name) == EVERY[setting.name]
    every = GenerationConfig(**EVERY | {"regions": (BOX,)})
    assert configure(arguments("generate", words), None) == every
    table = {name: value for name, value in EVERY.items() if name not in GenerationConfig.users_own} | {
        "regions": [BOX.to_json()]
    }
    own = {name: EVERY[name] for name in GenerationConfig.users_own}
    assert GenerationConfig(**own).with_base_defaults(table) == every


def test_flags_override_the_recipe_and_everything_else_stays():
    recipe = Recipe(config=GenerationConfig(**EVERY), base="pocket")
    config = configure(arguments("generate", ["--from", "a.png", "--steps", "9", "--region", "auto"]), recipe)
    assert config == GenerationConfig(**EVERY | {"num_inference_steps": 9, "regions": "auto"})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"seed": -1}, "seed must be between 0 and 9223372036854775807, got -1."),
        ({"seed": 2**63}, "seed must be between 0 and 9223372036854775807, got 9223372036854775808."),
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 1000, got 0."),
        ({"steps": 0}, "num_inference_steps must be between 1 and 1000, got 0."),
        ({"num_images": 0}, "num_images must be between 1 and 256, got 0."),
        ({"num_images": 257}, "num_images must be between 1 and 256, got 257."),
        ({"width": 0}, "width must be between 8 and 8192, got 0."),
        ({"height": 80_000}, "height must be between 8 and 8192, got 80000."),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan."),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf."),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1, got 1.5."),
        ({"image_strength": 0}, "image_strength must be between 0.01 and 1, got 0."),
        ({"gating": "words"}, "gating must be 'tokens' or 'none', got 'words'."),
        ({"num_images": 2, "batch": 2}, "'num_images' and 'batch' are two names of one setting; give one of them."),
        ({"sede": 1}, "unknown key 'sede'; did you mean 'seed'?"),
        ({"regions": [{"prompt": "a"}]}, "A region is a prompt with a box"),
        ({"regions": [BOX] * 65}, "regions must have at most 64 items"),
        ({"regions": 3}, "regions must be a valid tuple, got 3."),
    ],
)
def test_bounds_stand_in_the_fields(values, problem):
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(prompt="a dog", **values)
    assert problem in str(caught.value)


def test_the_largest_settings_are_settings(tmp_path):
    config = GenerationConfig(prompt="", seed=2**63 - 1, num_images=2)
    assert config.seeds() == [2**63 - 1, 0]
    recipe = Recipe(config=config, base="x", index=1)
    assert recipe_of(png(tmp_path / "a.png", json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(ConfigError, match="index 2 is beyond the 2 pictures"):
        Recipe(config=config, base="x", index=2)


def test_too_few_steps_to_leave_a_picture_are_refused():
    pipe, start = tiny.pipeline("sd1"), Image.new("RGB", (16, 16))
    config = GenerationConfig(prompt="a dog", num_inference_steps=10, image_strength=0.09)
    with pytest.raises(ConfigError, match=r"10 steps at image_strength 0\.09 are less than one"):
        fusion.generate(pipe, config, image=start)


def test_former_recipes_go_on_working(tmp_path):
    recipe = recipe_of(png(tmp_path / "a.png", json.dumps(FORMER)))
    assert (recipe.config.num_inference_steps, recipe.config.num_images, recipe.index) == (2, 2, 1)
    assert (recipe.config.scheduler, recipe.config.gating, recipe.picture_seed) == ("euler", None, 6)
    assert recipe.config.regions == (Region("<rex>", (0, 0, 0.5, 1)), Region("a bird", mask=MASK))
    assert recipe.adapters[0].tokens == ("<rex>",) and recipe.adapters[0].strength == 0.7
    assert "gating" not in recipe.config.model_fields_set  # what was open is open


HOSTILE = [
    None, True, -1, 0, 2**70, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "\0", "\ud800", [], [[]],
    [None], {},
    {"prompt": "a"}, {"prompt": 1, "box": [0, 0, 1, 1]}, [{"prompt": "a", "box": [0, 0, 1, 10**400]}],
    [{"prompt": "a", "box": ["0", 0, 1, 1]}], [{"prompt": "a", "mask": "AAAA"}], [{"prompt": "a", "mask": "?"}],
    [{"name": "a"}], [[["a"]]], [1],
]  # fmt: skip


def test_hostile_recipes_end_in_a_format_error_or_are_recipes(tmp_path):
    draw, refused = random.Random(0), 0
    for _ in range(400):
        table = json.loads(json.dumps(FORMER))
        for _ in range(draw.choice([1, 1, 2, 3])):
            used = table["adapters"][0] if table.get("adapters") == FORMER["adapters"] else table
            part = draw.choice([table, table, table, used])
            key = draw.choice([*part, "config", "steps ", "__class__"])
            if draw.random() < 0.2:
                part.pop(key, None)
            else:
                part[key] = draw.choice(HOSTILE)
        try:
            recipe = Recipe.from_json(table)
            assert recipe == Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) and recipe.parameters()
        except ConfigError as error:
            assert "\n\n" not in str(error) and len(str(error)) < 2000
            refused += 1
    assert refused > 200
    for key in ("prompt", "base", "scheduler", "regions"):
        text = "\ud800" if key != "regions" else [{"prompt": "\ud800", "box": [0, 0, 1, 1]}]
        with pytest.raises(ConfigError):
            Recipe.from_json(FORMER | {key: text})
    bombs = ["[" * 100_000, "{" * 100_000, '{"a":' * 50_000, "1", '"x"', "[]", "null", "", "NaN", "9" * 5000, "{}"]
    for number, text in enumerate(bombs):
        with pytest.raises(FormatError, match="is damaged: "):
            recipe_of(png(tmp_path / f"{number}.png", text))


@pytest.mark.parametrize(
    "content",
    [
        'prompt = "a cat"', "sede = 1", 'seed = "1"', "num_inference_steps = 0", "steps = 2\nnum_inference_steps = 3",
        "guidance_scale = nan", "width = 1979-05-27", "regions = [{ prompt = 1 }]", 'output = "x"', "scheduler = [[]]",
    ],
)  # fmt: skip
def test_a_bases_defaults_are_checked_as_the_users_are(content):
    with pytest.raises(ConfigError, match=r"^With the base's fusion\.toml: "):
        GenerationConfig(prompt="a dog").with_base_defaults(tomllib.loads(content))


def test_what_nobody_set_comes_from_the_base_and_then_from_the_defaults(tmp_path):
    pipe = tiny.pipeline("sd1")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "fusion.toml").write_text('[generation]\nsteps = 2\nnegative_prompt = "snow"\nguidance_scale = 3\n')
    pipe = fusion.open_pipeline(tmp_path)
    config = fusion.generate(pipe, GenerationConfig(prompt="a dog", guidance_scale=2.0))[0].recipe.config
    assert (config.num_inference_steps, config.negative_prompt, config.guidance_scale) == (2, "snow", 2.0)
    assert (config.guidance_rescale, config.width, config.height) == (0.0, 16, 16)
    (tmp_path / "fusion.toml").write_text('[generation]\nprompt = "a cat"\n')
    with pytest.raises(ConfigError, match="sets 'prompt', which only you may set"):
        fusion.generate(pipe, "a dog")


def test_settings_as_keywords_work_for_one_release_and_warn_once():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, "<rex>")
    config = GenerationConfig(prompt="a <rex>", num_inference_steps=2, num_images=2, seed=3, negative_prompt="snow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = fusion.generate(pipe, config, [adapter], strengths=[0.5])
        fusion.generate(pipe, "a <rex>", adapters=[adapter], strengths=[0.5], on_step=lambda *_: None)
    for prompt in ({"prompt": "a <rex>"}, {}):
        with pytest.warns(FutureWarning, match="write generate\\(pipe, GenerationConfig") as caught:
            old = fusion.generate(
                pipe, *([] if prompt else ["a <rex>"]), **prompt, adapters=[adapter], strengths=[0.5], steps=2, batch=2,
                seed=3, negative_prompt="snow", scheduler=None,
            )  # fmt: skip
        assert len(caught) == 1 and caught[0].filename == __file__
        assert all(np.array_equal(a.image, b.image) and a.recipe == b.recipe for a, b in zip(old, new, strict=True))
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match="unknown key 'sede'; did you mean 'seed'"):
        fusion.generate(pipe, "a dog", sede=1)
    with pytest.raises(ConfigError, match="'prompt' is missing"):
        fusion.generate(pipe)


@pytest.mark.parametrize("file", ["a" * 5000, "~nobody/x", "a\0b", "/"])
def test_an_adapters_file_in_a_hostile_recipe_is_only_a_hint(file, tmp_path, capsys):
    path = png(tmp_path / "a.png", json.dumps(FORMER | {"adapters": [FORMER["adapters"][0] | {"file": file}]}))
    assert main(["generate", "--from", str(path)]) == 1
    line = capsys.readouterr().err
    assert "is gone" in line and line.count("\n") == 1


def test_settings_of_a_drawing_need_neither_torch_nor_pillow():
    code = "import sys, fusion.generation.config; print({'torch', 'PIL', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_docstrings_of_settings_are_their_help():
    for setting in settings_of(GenerationConfig):
        assert setting.help.endswith(".") and setting.group, setting.name
    assert Path(fusion.pocket() / "fusion.toml").is_file()
    fusion.GenerationConfig(prompt="").with_base_defaults(
        tomllib.loads((fusion.pocket() / "fusion.toml").read_text())["generation"]
    )
