"""Where in a picture the concepts of its prompt will be, as masks: `--region auto` in ComfyUI's own sampling.

The first quarter of the steps is drawn with every concept called by its noun. One more step is then taken from there
for each concept, with its token in place of its noun, and one without any token: a concept will be where its step
differs from that one.

Shapes: C concepts, H W latent size.
"""

import torch
from torch import Tensor

from fusion.adapters.adapter import nouns
from fusion.comfyui.attachment import entries_of
from fusion.comfyui.base import Clip, Conditioning, ModelPatcher
from fusion.config import lower_tokens
from fusion.errors import ConfigError
from fusion.generation.concept_cells import LAYOUT_SHARE, MIN_STEPS, by_nouns, cells_by_concept
from fusion.models.binding import with_bound_words

MAX_CONCEPTS = 4
PIXELS = 8  # of the picture to a cell of the latent, in each direction


def find_masks(
    model: ModelPatcher, clip: Clip, prompt: str, negative: Conditioning, latent: Tensor, *,
    seed: int, steps: int, cfg: float, sampler: str, scheduler: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Token -> mask (1, 8 H, 8 W) of 0 and 1, for each concept in the order of the prompt; no cell is in two.

    `latent` (B, channels, H, W) is what KSampler would start from. Raises ConfigError for prompts of fewer than two or
    of more than MAX_CONCEPTS concepts.
    """
    from comfy.sample import fix_empty_latent_channels, prepare_noise, sample

    adapters = [entry.adapter for entry in entries_of(clip.patcher)]
    by_token = nouns(adapters)
    prompt = lower_tokens(with_bound_words(prompt, adapters), by_token)
    tokens = sorted((token for token in by_token if token in prompt), key=prompt.index)
    if not 2 <= len(tokens) <= MAX_CONCEPTS:
        names = ", ".join(tokens) or "none"
        raise ConfigError(f"Masks are found for 2 to {MAX_CONCEPTS} concepts; the prompt has {len(tokens)}: {names}.")
    clip = clip.clone()
    clip.tokenizer = clip.tokenizer.without_phrases()  # the noun of a bound LoRA is the phrase that it is bound to

    def encode(keep: list[str]) -> Conditioning:
        text = by_nouns(prompt, {token: by_token[token] for token in tokens}, keep)
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    steps = max(steps, MIN_STEPS)
    midway = int(LAYOUT_SHARE * steps)
    latent = fix_empty_latent_channels(model, latent[:1])
    options = {"seed": seed, "disable_pbar": True}
    by_noun = encode([])
    layout = sample(
        model, prepare_noise(latent, seed), steps, cfg, sampler, scheduler, by_noun, negative, latent, start_step=0,
        last_step=midway, **options,
    )  # fmt: skip
    no_noise = torch.zeros_like(layout)
    latents: list[Tensor] = [
        sample(
            model, no_noise, steps, 1.0, "euler", scheduler, positive, negative, layout, disable_noise=True,
            start_step=midway, last_step=midway + 1, **options,
        )
        for positive in (by_noun, *(encode([token]) for token in tokens))
    ]  # fmt: skip
    # An Euler step is linear in the prediction, so these are its changes but for a factor.
    maps = torch.cat([after - latents[0] for after in latents[1:]]).float().square().mean(dim=1)  # (C, H, W)
    masks = cells_by_concept(maps).float().repeat_interleave(PIXELS, dim=1).repeat_interleave(PIXELS, dim=2)
    return dict(zip(tokens, masks[:, None], strict=True))
