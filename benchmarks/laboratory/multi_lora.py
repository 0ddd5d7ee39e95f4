"""Ways without fusion: LoRA switch and LoRA composite (Zhong et al. 2024, Multi-LoRA Composition, 2402.16843).

As in the paper, the adapters of the prompt's concepts take part, one at a time: with switch, each for a few denoising
steps in turn; with composite, each in every step, and the mean of their predictions is used. Each encodes the prompt
with its own changes to the text encoder.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fusion

SWITCH_STEPS = 5  # of one adapter under switch; the paper's


def switch(pipe: Any, adapters: Sequence[fusion.Adapter], prompt: str, seed: int, batch: int) -> list[Image.Image]:
    """Adapter (step // 5) mod N at each step."""

    def choose(step: int, count: int) -> Sequence[int]:
        return [step // SWITCH_STEPS % count]

    return _draw(pipe, adapters, prompt, seed, batch, choose)


def composite(pipe: Any, adapters: Sequence[fusion.Adapter], prompt: str, seed: int, batch: int) -> list[Image.Image]:
    """The mean over all adapters at each step."""
    return _draw(pipe, adapters, prompt, seed, batch, lambda step, count: range(count))


def _draw(
    pipe: Any,
    adapters: Sequence[fusion.Adapter],
    prompt: str,
    seed: int,
    batch: int,
    choose: Callable[[int, int], Sequence[int]],
) -> list[Image.Image]:
    active = [a for a in adapters if any(concept.token in prompt for concept in a.info.concepts)]
    with ExitStack() as attached:
        handles = [attached.enter_context(fusion.attach(pipe, adapter)) for adapter in active]

        def activate(index: int) -> None:
            for k, (adapter, handle) in enumerate(zip(active, handles, strict=True)):
                for branch in adapter.branches:
                    handle.strength(branch.name, branch.strength if k == index else 0.0)

        if active:
            attached.enter_context(_one_at_a_time(pipe, len(active), activate, choose, prompt))
        config = fusion.GenerationConfig(prompt=prompt, seed=seed, num_images=batch)
        return [picture.image for picture in fusion.generate(pipe, config)]


@contextmanager
def _one_at_a_time(
    pipe: Any, count: int, activate: Callable[[int], None], choose: Callable[[int, int], Sequence[int]], prompt: str
) -> Generator[None]:
    """The UNet's prediction is the mean over the chosen adapters, each with its own embeddings of the prompt."""
    unet, embeddings = pipe.unet, list[Tensor]()
    for k in range(count):
        activate(k)
        positive, negative, *_ = pipe.encode_prompt(prompt, unet.device, 1, True)
        embeddings.append(torch.cat([negative, positive]))  # (2, T, D), in the order of guidance
    original, step = unet.forward, 0

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **more: Any) -> Any:
        nonlocal step
        batch = len(encoder_hidden_states) // 2
        predictions: list[Tensor] = []
        for k in choose(step, count):
            activate(k)
            states = embeddings[k].repeat_interleave(batch, dim=0)
            predictions.append(original(sample, timestep, encoder_hidden_states=states, **more)[0])
        step += 1
        return (torch.stack(predictions).mean(dim=0),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
