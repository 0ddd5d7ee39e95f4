"""The toy pipelines of tiny.py are worth testing with: they draw, repeat, and listen to their input."""

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

import tiny


def draw(pipe, prompt="a photo of a dog", seed=0, **options):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0} | options
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(pipe(prompt, generator=generator, output_type="np", **options).images)


def test_a_full_call_draws_and_repeats(family):
    options = {"negative_prompt": "a cat", "num_images_per_prompt": 2, "guidance_scale": 5.0}
    first = draw(tiny.pipeline(family), **options)
    assert first.shape == (2, 16, 16, 3)
    assert first.isfinite().all() and first.std() > 0.05
    assert torch.equal(first, draw(tiny.pipeline(family), **options))


def test_prompt_noise_and_weights_all_matter(family, pipe):
    picture = draw(pipe)
    assert not torch.equal(picture, draw(pipe, prompt="a photo of a cat"))
    assert not torch.equal(picture, draw(pipe, seed=1))
    assert not torch.equal(picture, draw(tiny.pipeline(family, seed=1)))


def test_image_to_image_shares_the_components(family, pipe):
    kind = StableDiffusionXLImg2ImgPipeline if family == "sdxl" else StableDiffusionImg2ImgPipeline
    second = kind(**pipe.components)
    second.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 16, 16)
    assert draw(second, image=start, num_inference_steps=4, strength=0.5).shape == (1, 16, 16, 3)


def test_building_leaves_the_global_random_state_alone(family):
    before = torch.random.get_rng_state()
    tiny.pipeline(family)
    assert torch.equal(before, torch.random.get_rng_state())


def test_tokens_are_words_or_spelled_and_can_be_added():
    words = tiny.tokenizer()
    assert words.tokenize("A photo of <dog>") == ["a</w>", "photo</w>", "of</w>", "<</w>", "dog</w>", "></w>"]
    assert words.add_tokens(["<dog>"]) == 1
    assert words.tokenize("a <dog>, <dog>") == ["a</w>", "<dog>", ",</w>", "<dog>"]


def test_a_saved_pipeline_draws_the_same(tmp_path):
    pipe = tiny.pipeline("sd2")
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(again))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_old_clip_layout_has_the_same_weights_under_the_old_names(family):
    pipe = tiny.pipeline(family)
    new, old = pipe.text_encoder, tiny.old_clip_layout(pipe.text_encoder)
    assert {"text_model." + name for name in new.state_dict()} == old.state_dict().keys()
    ids = pipe.tokenizer("a dog", return_tensors="pt").input_ids
    assert torch.equal(new(ids).last_hidden_state, old(ids).last_hidden_state)
    picture = draw(pipe)
    pipe.register_modules(text_encoder=old)
    assert torch.equal(picture, draw(pipe))
    old.resize_token_embeddings(len(pipe.tokenizer) + 3, mean_resizing=False)
    assert new.get_input_embeddings().num_embeddings == len(pipe.tokenizer) + 3
