"""What the UNet is told is what the pipeline tells it."""

import torch

from fusion.models.denoising import encode_prompts, predict


def test_without_sizes_the_prediction_is_that_of_the_pipelines_own_first_step(pipe):
    calls = []
    hook = pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, output)), with_kwargs=True
    )
    pipe("a dog on a red background", num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator())
    hook.remove()
    ((noisy, time), (answer,)) = calls[0]
    with torch.no_grad():
        said = predict(pipe, noisy, time.expand(len(noisy)), encode_prompts(pipe, ["a dog on a red background"]))
    assert torch.equal(said, answer)
