"""What the toolkit needs of a pipeline: diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline have it."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn


class Pipeline(Protocol):
    """The part of a diffusers Stable Diffusion pipeline that the toolkit uses.

    Text encoders and tokenizers are looked up by name, since families differ in them. Attributes whose types diffusers
    does not declare are `Any`.
    """

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    scheduler: Any
    image_processor: Any  # VaeImageProcessor
    vae_scale_factor: int  # pixels a latent cell, along one side

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def components(self) -> Mapping[str, Any]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def encode_prompt(self) -> Any: ...
    @property
    def get_guidance_scale_embedding(self) -> Any: ...
    @property
    def set_progress_bar_config(self) -> Any: ...
    @property
    def save_pretrained(self) -> Any: ...
    @property
    def __call__(self) -> Any: ...
    def to(self, device: torch.device) -> Any: ...


def uncompiled(module: nn.Module) -> nn.Module:
    """A model without torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def execution_device(pipe: Pipeline, module: nn.Module) -> torch.device:
    """Where a model computes: under offloading (accelerate's, diffusers' by groups), not where its weights are now."""
    offloaded = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
    return pipe._execution_device if offloaded else module.device  # pyright: ignore


def config_of(module: nn.Module) -> Mapping[str, Any]:
    """A model's config, also under torch.compile's wrapper."""
    inner: Any = uncompiled(module)
    return dict(inner.config)
