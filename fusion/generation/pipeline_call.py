"""One call of a diffusers pipeline for a batch of pictures, with the user's scheduler and progress bar untouched."""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from fusion.errors import ConfigError
from fusion.generation.config import GenerationConfig
from fusion.generation.prompt_embeddings import embed_prompts, pictures_by_chunks
from fusion.generation.regions import Cover, drawing_regions
from fusion.generation.schedulers import own_scheduler
from fusion.models.autoencoder import decode_latents
from fusion.models.denoising import has_ip_adapter, is_inpainting
from fusion.models.pipeline import Pipeline

OnStep = Callable[[int, int, Callable[[], Image.Image]], None]


def call_pipeline(
    pipe: Pipeline,
    config: GenerationConfig,
    image: Image.Image | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    mask: Image.Image | None = None,
) -> list[Image.Image]:
    """Draw a batch, or one for each number of chunks of its prompts.

    `config` has a size and regions with prompts of their own; `options` go to the pipeline.

    `mask` is white where `image` is drawn anew. Raises ConfigError where numbers overflow.
    """
    with own_scheduler(pipe, config.scheduler), _without_progress_bar(pipe):
        call = _pipeline_for(pipe, image, mask)
        pictures: dict[int, Image.Image] = {}
        for numbers in pictures_by_chunks(call, config):
            arguments = {"output_type": "np", **(options or {}), **_options(call, config, image, mask, numbers)}
            arguments |= embed_prompts(call, config, numbers)
            with _regions(pipe, config), _usual_channels(pipe, mask):
                pictures |= zip(numbers, _pictures(call(**arguments)), strict=True)
        return [picture for _, picture in sorted(pictures.items())]


def check_start(pipe: Pipeline, image: Image.Image | None, mask: Image.Image | None) -> None:
    """Raise ConfigError where a drawing needs a picture or a mask that is not given, or something no setting gives."""
    if mask is not None and image is None:
        raise ConfigError("A mask says where a picture is drawn anew; give the picture, too (--image).")
    if is_inpainting(pipe) and mask is None:
        raise ConfigError("This base is for inpainting: give a picture and a mask (--image, --mask).")
    if part := next((name for name in ("controlnet", "adapter") if pipe.components.get(name) is not None), None):
        raise ConfigError(f"generate() has no picture for the {part} of {type(pipe).__name__}: attach(), and call it.")
    if has_ip_adapter(pipe):
        raise ConfigError("generate() has no picture for an IP-Adapter: attach(), and call the pipeline yourself.")


def _pipeline_for(pipe: Pipeline, image: Image.Image | None, mask: Image.Image | None) -> Any:
    """The pipeline of the same components that draws from a prompt alone, from a picture, or in a mask."""
    takes = inspect.signature(pipe.__call__).parameters
    if ("strength" in takes, "mask_image" in takes) == (image is not None, mask is not None):
        return pipe
    auto: Any = diffusers
    kind = ("Text2Image", "Image2Image", "Inpainting")[(image is not None) + (mask is not None)]
    call: Any = getattr(auto, f"AutoPipelineFor{kind}").from_pipe(pipe)
    call.set_progress_bar_config(disable=True)
    return call


def _regions(pipe: Pipeline, config: GenerationConfig) -> AbstractContextManager[None]:
    if not config.regions:
        return nullcontext()
    assert config.regions != "auto" and config.width and config.height
    scale = pipe.vae_scale_factor
    return drawing_regions(pipe, Cover(config.regions, config.height // scale, config.width // scale))


@contextmanager
def _usual_channels(pipe: Pipeline, mask: Image.Image | None) -> Generator[None]:
    """While inpainting, a UNet for other latents than four channels shows a config that names four.

    diffusers' pipelines read that number only to tell a base of its own latents (4) from one that also takes mask and
    picture (9), and refuse others; they draw with the VAE's number.
    """
    channels = pipe.unet.config.in_channels
    if mask is None or is_inpainting(pipe) or channels == 4:
        yield
        return
    pipe.unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        pipe.unet.register_to_config(in_channels=channels)


def _options(
    call: Any,
    config: GenerationConfig,
    image: Image.Image | None,
    mask: Image.Image | None,
    numbers: Sequence[int],
) -> dict[str, Any]:
    seeds = config.seeds()
    options: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        # Drawn on the CPU, so that a seed means the same on every device.
        "generator": [torch.Generator("cpu").manual_seed(seeds[number]) for number in numbers],
    }
    assert config.width and config.height
    if image is None:
        options |= {"width": config.width, "height": config.height}
    else:
        resized = image.resize((config.width, config.height), Image.Resampling.LANCZOS)
        options |= {"image": [resized] * len(numbers), "strength": config.image_strength}
    if mask is not None:
        inside = mask.resize((config.width, config.height), Image.Resampling.LANCZOS)
        options |= {"mask_image": [inside] * len(numbers), "width": config.width, "height": config.height}
    if config.guidance_rescale and "guidance_rescale" in inspect.signature(call.__call__).parameters:
        options["guidance_rescale"] = config.guidance_rescale
    return options


def _pictures(result: Any) -> list[Image.Image]:
    """The pictures of a call. Raises ConfigError where they are NaN, which would be shown as black."""
    if not isinstance(result.images, np.ndarray):  # another output_type
        return result.images
    if not np.isfinite(result.images).all():
        raise ConfigError(
            "The drawing has overflowed: a strength or guidance_scale is too large for this base, or half precision is "
            "too small for it (--dtype float32)."
        )
    return VaeImageProcessor.numpy_to_pil(result.images)


def reporting(on_step: OnStep) -> dict[str, Any]:
    """Options of the pipeline that call `on_step` after every step."""

    def report(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1, pipe.num_timesteps, lambda: preview(pipe, tensors["latents"]))
        return tensors

    return {"callback_on_step_end": report}


def preview(pipe: Pipeline, latents: torch.Tensor) -> Image.Image:
    """The first picture as it is now; noisy latents (B, C, H, W) of any scheduler are brought to unit scale at most."""
    first = latents[:1].float()
    return decode_latents(pipe, first / first.std().clamp(min=1))[0]


@contextmanager
def _without_progress_bar(pipe: Pipeline) -> Generator[None]:
    """No progress bar of the pipeline's own: `on_step` reports."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
