"""What the UNet is told is what the pipeline tells it."""

import pytest
import torch

import tiny
from fusion.errors import ConfigError
from fusion.generation.config import GenerationConfig
from fusion.generation.prompt_embeddings import embed_prompts
from fusion.models.denoising import encode_prompts, predict


def test_without_sizes_the_prediction_is_that_of_the_pipelines_own_first_step(pipe):
    calls = []
    hook = pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, output)), with_kwargs=True
    )
    pipe("a dog in the snow", num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator())
    hook.remove()
    ((noisy, time), (answer,)) = calls[0]
    with torch.no_grad():
        said = predict(pipe, noisy, time.expand(len(noisy)), encode_prompts(pipe, ["a dog in the snow"]))
    assert torch.equal(said, answer)


def test_clip_skip_is_that_of_diffusers_in_both_layouts_of_the_text_encoder(pipe):
    prompts = ["a dog", "a cat in the snow"]
    skipped = encode_prompts(pipe, prompts, 1)
    pipe.register_modules(text_encoder=tiny.old_clip_layout(pipe.text_encoder))  # diffusers 0.42 needs it for this
    expected = pipe.encode_prompt(prompts, clip_skip=1, **call(guidance=False))
    assert torch.equal(skipped.states, expected[0]) and torch.equal(skipped.states, encode_prompts(pipe, prompts, 1)[0])
    assert not torch.equal(skipped.states, encode_prompts(pipe, prompts).states)
    assert all(map(torch.equal, encode_prompts(pipe, prompts, 0)[:1], encode_prompts(pipe, prompts)[:1]))
    with pytest.raises(ConfigError, match=r"clip_skip is 0 to \d on this base, whose text encoder has 2 layers"):
        encode_prompts(pipe, prompts, 3)


def test_prompts_with_a_negative_one_are_encoded_as_by_the_pipeline(pipe):
    for negative in ("", "a cat"):
        encoded = embed_prompts(pipe, GenerationConfig(prompt="a dog", negative_prompt=negative, num_images=2))
        expected = pipe.encode_prompt(
            ["a dog"] * 2, negative_prompt=[negative] * 2 if negative else None, **call(guidance=True)
        )
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        assert all(torch.equal(encoded[name], tensor) for name, tensor in zip(names, expected, strict=False))


def call(*, guidance):
    return {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": guidance}
