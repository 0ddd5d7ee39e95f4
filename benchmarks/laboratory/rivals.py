"""Rivals that fuse nothing: LoRA switch and LoRA composite (Zhong et al. 2024, Multi-LoRA Composition, 2402.16843).

As there, the adapters of the concepts that a prompt names take part, one at a time: under switch a few denoising steps
each in turn, under composite every step, and the mean of their predictions is followed. Each reads the prompt with its
own changes to the text encoder.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fusion

TURN = 5  # steps of one adapter under switch; the paper's


def switch(pipe: Any, adapters: Sequence[fusion.Adapter], prompt: str, seed: int, batch: int) -> list[Image.Image]:
    """Adapter (step // 5) mod N at each step."""

    def choose(step: int, count: int) -> Sequence[int]:
        return [step // TURN % count]

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
    named = [a for a in adapters if any(concept.token in prompt for concept in a.info.concepts)]
    with ExitStack() as held:
        handles = [held.enter_context(fusion.attach(pipe, adapter)) for adapter in named]

        def solo(chosen: int) -> None:
            for k, (adapter, handle) in enumerate(zip(named, handles, strict=True)):
                for branch in adapter.branches:
                    handle.strength(branch.name, branch.strength if k == chosen else 0.0)

        if named:
            held.enter_context(_taking_turns(pipe, len(named), solo, choose, prompt))
        config = fusion.GenerationConfig(prompt=prompt, seed=seed, num_images=batch)
        return [picture.image for picture in fusion.generate(pipe, config)]


@contextmanager
def _taking_turns(
    pipe: Any, count: int, solo: Callable[[int], None], choose: Callable[[int, int], Sequence[int]], prompt: str
) -> Generator[None]:
    """Let the UNet answer by the chosen adapters, each with its own reading of the prompt."""
    unet, read = pipe.unet, list[Tensor]()
    for k in range(count):
        solo(k)
        positive, negative, *_ = pipe.encode_prompt(prompt, unet.device, 1, True)
        read.append(torch.cat([negative, positive]))  # (2, T, D), in the order of guidance
    original, step = unet.forward, 0

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **more: Any) -> Any:
        nonlocal step
        each = len(encoder_hidden_states) // 2
        answers: list[Tensor] = []
        for k in choose(step, count):
            solo(k)
            states = read[k].repeat_interleave(each, dim=0)
            answers.append(original(sample, timestep, encoder_hidden_states=states, **more)[0])
        step += 1
        return (torch.stack(answers).mean(dim=0),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
