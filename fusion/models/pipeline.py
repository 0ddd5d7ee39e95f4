"""What the toolkit needs of a pipeline: diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline have it."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from fusion.errors import ConfigError


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
    def enable_model_cpu_offload(self) -> Any: ...
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


def check_resident(pipe: Pipeline, work: str) -> None:
    """Raise ConfigError where models move while they compute, as gradients and weights have to be on one device."""
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    if any(execution_device(pipe, module).type != module.device.type for module in modules):
        raise ConfigError(
            f"{work} needs every model to stay on its device, and this pipeline moves them (offloading); "
            "open the base without."
        )


def config_of(module: nn.Module) -> Mapping[str, Any]:
    """A model's config, also under torch.compile's wrapper."""
    inner: Any = uncompiled(module)
    return dict(inner.config)
