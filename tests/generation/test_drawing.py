"""generate: seeds, recipes, schedulers, img2img, cancelling."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fusion
import tiny
from fusion.adapters.adapter import Provenance
from fusion.distillation.teacher import Teacher
from fusion.errors import ConfigError, FormatError, UnknownName
from fusion.generation.config import GenerationConfig
from fusion.generation.recipe import Recipe
from fusion.generation.schedulers import SCHEDULERS
from trained import trained_adapter


def draw(pipe, prompt="a dog", adapters=(), *, strengths=None, image=None, on_step=None, **settings):
    """generate, in two steps unless told otherwise."""
    config = GenerationConfig.model_validate({"prompt": prompt, "num_inference_steps": 2, **settings})
    return fusion.generate(pipe, config, adapters, strengths=strengths, image=image, on_step=on_step)


def pixels(pictures):
    return [np.asarray(picture.image) for picture in pictures]


def test_every_family_draws_with_adapters_and_leaves_no_trace(pipe):
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    tokenizer, scheduler = pipe.tokenizer, pipe.scheduler
    drawn = draw(pipe, "a <rex> and a <tom>", adapters, negative_prompt="a cat")
    assert drawn[0].image.size == (16, 16)
    assert pipe.tokenizer is tokenizer and pipe.scheduler is scheduler
    assert [used.name for used in drawn[0].recipe.adapters] == ["rex", "tom"]


def test_equal_seeds_draw_equal_pictures_and_others_do_not():
    pipe = tiny.pipeline("sd1")
    one, two = pixels(draw(pipe, num_images=2, seed=3))
    again = pixels(draw(pipe, num_images=2, seed=3))
    assert np.array_equal(one, again[0]) and np.array_equal(two, again[1]) and not np.array_equal(one, two)


def test_strength_scales_the_change():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, "<rex>", gated=False)
    none = pixels(draw(pipe, "a dog", [adapter], strengths=[0.0]))
    assert np.array_equal(none, pixels(draw(pipe)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws(name):
    picture = draw(tiny.pipeline("sd1"), num_inference_steps=4, scheduler=name)[0]
    assert picture.recipe.config.scheduler == name and np.asarray(picture.image).std() > 0


def test_clip_skip_keeps_gates_exact_and_stands_in_the_recipe(pipe):
    one, two = trained_adapter(pipe, "<a>"), trained_adapter(pipe, "<b>", k=1)
    options = {"negative_prompt": "a cat", "clip_skip": 1}
    base, (alone,) = draw(pipe, **options), draw(pipe, "a <a>", [one], **options)
    assert np.array_equal(*map(np.asarray, (base[0].image, draw(pipe, adapters=[one, two], **options)[0].image)))
    assert np.array_equal(alone.image, draw(pipe, "a <a>", [two, one], **options)[0].image)
    assert not np.array_equal(alone.image, draw(pipe, "a <a>", [one], negative_prompt="a cat")[0].image)
    assert alone.recipe.config.clip_skip == 1
    again = fusion.generate(pipe, Recipe.from_json(alone.recipe.to_json()).config, [one])
    assert np.array_equal(alone.image, again[0].image)
    old = {name: value for name, value in base[0].recipe.to_json().items() if name != "clip_skip"}
    assert Recipe.from_json(old).config.clip_skip == 0


@pytest.mark.usefixtures("few_steps")
def test_another_clip_skip_than_the_training_s_is_warned_of_once(caplog):
    pipe, drawing_of_two = tiny.pipeline("sd1"), {"num_inference_steps": 1, "clip_skip": 1}
    parts = [trained_adapter(pipe, token, k=k) for k, token in enumerate(("<mia>", "<leo>"))]
    settings = Provenance(settings={"clip_skip": 1})
    one, two = (replace(part, info=replace(part.info, provenance=settings)) for part in parts)
    for adapters in ([one, two], [fusion.fuse([one, two])], parts):
        draw(pipe, "a <mia>", adapters, **drawing_of_two)
    assert not warnings_of(caplog)
    draw(pipe, "a <mia>", [fusion.fuse([one, two])])
    assert warnings_of(caplog) == [
        "'mia+leo' was trained with clip_skip 1 and is drawn with 0, so its concepts may look different."
    ]
    list(fusion.compare(pipe, [one], "a <mia>", strengths=[1.0], num_inference_steps=1))
    assert len(warnings_of(caplog)) == 2
    (cell,) = fusion.compare(pipe, [one], "a <mia>", strengths=[1.0], **drawing_of_two)
    assert len(warnings_of(caplog)) == 2 and cell.picture.recipe.config.clip_skip == 1
    other = replace(two, info=replace(two.info, provenance=Provenance(settings={"clip_skip": 0})))
    fused = fusion.fuse([one, other, parts[0].renamed({"<mia>": "<zoe>"})])
    assert "clip_skip" not in fused.info.provenance.settings
    assert warnings_of(caplog, "fusion.composition.fusing") == [
        "Trained with different clip_skip: 'mia' with 1, 'leo' with 0. A picture has one, so some may look different."
    ]
    Teacher(pipe, [one, other], parts[0].renamed({"<mia>": "<zoe>"}), None)
    assert warnings_of(caplog, "fusion.distillation.teacher") == [
        "'mia' was trained with clip_skip 1 and is distilled with 0, so its concepts may look different. Set the "
        "distillation's clip_skip to that of your pictures."
    ]


def warnings_of(caplog, name="fusion.generation.drawing"):
    return [record.getMessage() for record in caplog.records if record.name == name]


def test_mistakes_are_named():
    pipe = tiny.pipeline("sd1")
    with pytest.raises(UnknownName, match="did you mean 'euler'"):
        draw(pipe, scheduler="eulr")
    for name, near in (("DPM++ 2M Karras", "dpmpp_2m_karras"), ("Euler a", "euler_a")):  # as A1111 writes them
        with pytest.raises(UnknownName, match=f"did you mean '{near}'"):
            draw(pipe, scheduler=name)
    with pytest.raises(ConfigError, match="multiple of"):
        draw(pipe, width=17)
    with pytest.raises(ConfigError, match="one strength for each of the 0 adapters; got 1"):
        draw(pipe, strengths=[1.0])


def test_zero_terminal_snr_is_not_silently_ignored():
    pipe = fusion.open_pipeline()
    with pytest.raises(ConfigError, match="zero-terminal"):
        draw(pipe, scheduler="heun")


def test_a_picture_carries_the_recipe_that_draws_it_again(tmp_path):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, "<rex>")
    picture = draw(pipe, "a <rex>", [adapter], strengths=[0.7], num_images=2, seed=5)[1]
    recipe = fusion.recipe_of(picture.save(tmp_path / "new" / "rex.png"))
    assert recipe == picture.recipe
    assert recipe.adapters[0].digest == adapter.digest() and recipe.adapters[0].strength == 0.7
    again = fusion.generate(pipe, recipe.config, [adapter], strengths=[recipe.adapters[0].strength])[recipe.index]
    assert np.array_equal(again.image, np.asarray(Image.open(tmp_path / "new" / "rex.png")))


def test_foreign_and_damaged_recipes_are_refused(tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(FormatError, match="no recipe"):
        fusion.recipe_of(plain)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FormatError, match="cannot be read"):
        fusion.recipe_of(tmp_path / "text.png")


def test_a_recipe_behind_the_pixels_is_read_where_they_are_few(tmp_path):
    recipe = fusion.Recipe(config=GenerationConfig(prompt="a dog"), base="toy").to_json()
    text = b"tEXtfusion\0" + json.dumps(recipe).encode()
    chunk = (len(text) - 4).to_bytes(4) + text + zlib.crc32(text).to_bytes(4)
    for side in (8, 4097):
        Image.new("1", (side, side)).save(path := tmp_path / f"{side}.png")
        picture = path.read_bytes()
        path.write_bytes(picture[:-12] + chunk + picture[-12:])  # before IEND
    assert fusion.recipe_of(tmp_path / "8.png").config.prompt == "a dog"
    with pytest.raises(FormatError, match="no recipe"):  # nothing that large is decoded for it
        fusion.recipe_of(tmp_path / "4097.png")


def test_pictures_that_overflow_are_refused_instead_of_black():
    pipe = tiny.pipeline("sd1")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(ConfigError, match="has overflowed"):
        draw(pipe, num_images=2)


def test_img2img_starts_from_the_picture(family):
    pipe = tiny.pipeline(family)
    start = Image.new("RGB", (16, 16), "red")
    weak = draw(pipe, image=start, image_strength=0.3, num_inference_steps=4)[0]
    strong = draw(pipe, image=start, image_strength=1.0, num_inference_steps=4)[0]
    assert weak.recipe.image and weak.recipe.config.image_strength == 0.3
    assert not np.array_equal(weak.image, strong.image)


def test_previews_are_told_each_step_and_cancelling_leaves_no_trace():
    pipe = tiny.pipeline("sd1")
    adapter, tokenizer, seen = trained_adapter(pipe, "<rex>"), pipe.tokenizer, []

    def watch(step, total, preview):
        seen.append((step, total, preview().size))
        if step == 2:
            raise fusion.Cancelled("enough")

    with pytest.raises(fusion.Cancelled):
        draw(pipe, "a <rex>", [adapter], num_inference_steps=4, on_step=watch)
    assert seen == [(1, 4, (16, 16)), (2, 4, (16, 16))]
    assert pipe.tokenizer is tokenizer
