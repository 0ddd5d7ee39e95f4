"""A pipeline, adapters and a prompt become pictures, each with the whole recipe that made it.

Knows nothing of training or files of adapters; the preview of a training is drawn by this code too.
"""

import hashlib
import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

from PIL import Image

from fusion.adapters.adapter import Adapter, checked_strengths, nouns
from fusion.adapters.combination_checks import other_clip_skip
from fusion.config import lower_tokens
from fusion.errors import ConfigError, FusionError
from fusion.formats.picture_file import as_mask, as_picture
from fusion.generation.auto_regions import find_regions, with_prompt
from fusion.generation.config import GenerationConfig
from fusion.generation.pipeline_call import OnStep, call_pipeline, check_start, reporting
from fusion.generation.recipe import Picture, Recipe, UsedAdapter
from fusion.models.attachment import attach
from fusion.models.binding import bound_to_pictures, bound_words, unused_words, with_bound_words
from fusion.models.model_state import attached_state
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_defaults, base_name
from fusion.prompt_syntax import unknown_syntax

logger = logging.getLogger(__name__)


class Cancelled(FusionError):
    """Raised by an `on_step` to stop a picture in the middle; the pipeline is left as it was found."""


def generate(
    pipe: Pipeline,
    config: GenerationConfig | str | Sequence[str] | None = None,
    adapters: Sequence[Adapter] = (),
    *,
    strengths: Sequence[float] | None = None,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    on_step: OnStep | None = None,
    **former: object,
) -> list[Picture]:
    """Draw pictures of a prompt; picture i starts from seed + i. `config` may be the prompt, or several, alone.

    Several prompts are drawn in one batch, each with its own concepts, exact as alone in a batch of this size; those of
    different numbers of chunks in one batch each. A recipe has them all, and draws its picture again.

    Adapters are attached for the call and taken out again whatever happens. What `config` does not set comes from the
    base's `fusion.toml`, then from the defaults, a size from the pipeline. With `image` the drawing starts from that
    picture, and with `mask` it is drawn anew where the mask is white (inpainting). With `regions` their parts of the
    picture follow their prompts instead of the picture's; one that holds nothing but tokens, "<dog>", follows the
    picture's prompt with all other concepts by their nouns. With "auto" every concept of a prompt that names several
    gets a region, where the base would draw it; so it is, too, where a prompt names several adapters that were bound
    to words (`bind`) and act in layers that see no tokens. The regions stand in the recipe of each picture.
    `on_step(step, total, preview)` is called after every step; preview() decodes the first picture.
    Raises ConfigError, UnknownName for a scheduler, and whatever attach raises; Cancelled passes through.
    Settings as keywords, the form until 0.1, still work and warn.
    """
    config = _settings(config, former).with_base_defaults(base_defaults(pipe, "generation"))
    image, mask = image and as_picture(image), mask and as_mask(mask)
    check_start(pipe, image, mask)
    config = _with_known_words(pipe, _sized(pipe, config, image), adapters)
    values = checked_strengths(adapters, strengths)
    recipe = Recipe(
        config=config,
        base=base_name(pipe),
        adapters=tuple(_used(adapter, value) for adapter, value in zip(adapters, values, strict=True)),
        image=hashlib.sha256(image.tobytes()).hexdigest() if image else None,
        mask=hashlib.sha256(mask.tobytes()).hexdigest() if mask else None,
    )
    every_noun = nouns(adapters)

    def nouns_in(prompt: str) -> dict[str, str]:
        return {token: noun for token, noun in every_noun.items() if token in prompt}

    named = nouns_in(" ".join(config.prompts))
    bound = max((bound_to_pictures(adapters, prompt) for prompt in config.prompts), key=len)
    if not config.regions and len(bound) > 1:
        config = config.updated({"regions": "auto"})
        logger.warning(
            "%s change layers that see no tokens: there, each acts in a region where the base would draw it. Give "
            "regions to set others.", " and ".join(bound),
        )  # fmt: skip
    parts = [] if config.regions == "auto" else [region.prompt for region in config.regions]
    if unused := unused_words(adapters, " ".join([*config.prompts, *parts])):
        logger.warning("The prompt does not have %s, so what is bound to it does nothing.", " or ".join(unused))
    _warn_about_settings(config, image, len(named))
    for adapter in adapters:
        if sentence := other_clip_skip(adapter, config.clip_skip, "drawn"):
            _warn_once(sentence)
    with ExitStack() as attached:
        for adapter, strength in zip(adapters, values, strict=True):
            handle = attached.enter_context(attach(pipe, adapter, config.gating))
            for branch in adapter.branches:
                handle.strength(branch.name, branch.strength * strength)
        if config.regions == "auto":
            # Every picture has a layout of its own, so they are drawn one by one.
            pictures = zip(config.picture_prompts(), config.seeds(), strict=True)
            singles = [
                (prompt, config.updated({"prompt": prompt, "seed": seed, "num_images": 1})) for prompt, seed in pictures
            ]
            configs = [
                one.updated({"regions": find_regions(pipe, one, image, nouns_in(prompt), mask)})
                for prompt, one in singles
            ]
        else:
            regions = [with_prompt(region, config.prompts[0], named) for region in config.regions]
            configs = [config.updated({"regions": regions})]
        options = reporting(on_step) if on_step else {}
        batches = [(one, call_pipeline(pipe, one, image, options, mask=mask)) for one in configs]
    return [
        Picture(drawn, recipe.updated({"config": one, "index": index}))
        for one, images in batches
        for index, drawn in enumerate(images)
    ]


def _settings(config: GenerationConfig | str | Sequence[str] | None, former: dict[str, object]) -> GenerationConfig:
    if isinstance(config, GenerationConfig) and not former:
        return config
    if former:
        new = "generate(pipe, GenerationConfig(prompt=..., seed=..., num_inference_steps=...), adapters)"
        warnings.warn(f"Settings as keywords of generate go with the next release; write {new}.", FutureWarning, 3)
    values = {} if config is None else {"prompt": config}
    if isinstance(config, GenerationConfig):
        values = config.settings()
    given = {name: value for name, value in GenerationConfig.canonical(former).items() if value is not None}
    return GenerationConfig.model_validate({**values, **given})


def _sized(pipe: Pipeline, config: GenerationConfig, image: Image.Image | None) -> GenerationConfig:
    """Settings with a size. Raises ConfigError for one that does not suit the base, or no step to draw."""
    usual = pipe.unet.config.sample_size * pipe.vae_scale_factor
    size = {"width": image.width if image else usual, "height": image.height if image else usual}
    config = config.updated({side: getattr(config, side) or pixels for side, pixels in size.items()})
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    for side in size:
        if getattr(config, side) % multiple:
            raise ConfigError(f"{side} {getattr(config, side)} does not suit this base; use a multiple of {multiple}.")
    if image and config.num_inference_steps * config.image_strength < 1:
        steps, strength = config.num_inference_steps, config.image_strength
        raise ConfigError(f"{steps} steps at image_strength {strength:g} are less than one; raise one of them.")
    return config


def _with_known_words(pipe: Pipeline, config: GenerationConfig, adapters: Sequence[Adapter]) -> GenerationConfig:
    """Settings in which tokens are in lower case, and stand for the phrases of bound adapters."""
    state = attached_state(pipe)
    concepts = [*(state.tokens.concepts if state else ()), *(c for adapter in adapters for c in adapter.info.concepts)]
    tokens = {concept.token for concept in concepts}
    values: dict[str, object] = {}
    prompts = tuple(lower_tokens(with_bound_words(prompt, adapters), tokens) for prompt in config.prompts)
    if prompts != config.prompts:
        values["prompt"] = prompts[0] if isinstance(config.prompt, str) else prompts
    if config.regions != "auto":
        texts = [_region_prompt(part.prompt, adapters, tokens) for part in config.regions]
        regions = tuple(replace(part, prompt=text) for part, text in zip(config.regions, texts, strict=True))
        if any(new.prompt != part.prompt for new, part in zip(regions, config.regions, strict=True)):
            values["regions"] = regions
    return config.updated(values)


def _region_prompt(prompt: str, adapters: Sequence[Adapter], tokens: set[str]) -> str:
    """A region's prompt with known words. Where it names a token, phrases are words of the base.

    So they are in the regions of recipes, which call other bound concepts by their phrases.
    """
    prompt = lower_tokens(prompt, tokens)
    return prompt if any(token in prompt for token in tokens) else with_bound_words(prompt, adapters)


def _warn_about_settings(config: GenerationConfig, image: Image.Image | None, named: int) -> None:
    """Name the settings that do nothing in this drawing, and what of its prompts is not understood."""
    regions = [] if config.regions == "auto" else [region.prompt for region in config.regions]
    prompts = [*config.prompts, config.negative_prompt, *regions]
    if unknown := [text for prompt in prompts for text in unknown_syntax(prompt, config.prompt_weighting)]:
        logger.warning("%s means nothing here; it is read as plain text.", ", ".join(unknown))
    if config.regions == "auto" and named < 2:
        names = f"names {named} of those given" if named else "names none of those given"
        logger.warning("regions = 'auto' does nothing: it places two or more concepts, and the prompt %s.", names)
    if config.negative_prompt and config.guidance_scale <= 1:
        logger.warning(
            "negative_prompt does nothing at guidance_scale %g; it needs more than 1.", config.guidance_scale
        )
    if image is None and config.image_strength != GenerationConfig.model_fields["image_strength"].default:
        logger.warning("image_strength does nothing without a picture to start from.")


@cache
def _warn_once(sentence: str) -> None:
    logger.warning("%s", sentence)


def _used(adapter: Adapter, strength: float) -> UsedAdapter:
    tokens = tuple(concept.token for concept in adapter.info.concepts)
    word = next(iter(bound_words(adapter).values()), None) if len(tokens) == 1 else None
    name, digest = adapter.info.name, adapter.digest()
    return UsedAdapter(name=name, digest=digest, word=word, strength=strength, tokens=tokens)
