"""ComfyUI's MODEL and CLIP under the names of a diffusers pipeline, so that they can be read as one.

ComfyUI keeps Stable Diffusion's layers under the names of its first release. Here each layer stands under diffusers'
path, with the weight of the base, also while ComfyUI has added a LoRA to it. Nothing here is run.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from fusion.errors import BaseMismatch
from fusion.layer_names import TOKENIZERS, canonical

# ComfyUI's text encoders by family, in the order of the components; the widths of their prompts are joined in it.
_TEXT_ENCODERS = (("clip_l", "clip_g"), ("clip_h",), ("clip_l",))


Tokens = dict[str, list[list[Any]]]  # of a prompt, in ComfyUI: text encoder -> chunks of (token, weight)
Conditioning = list[list[Any]]  # in ComfyUI: encoded prompts with their options


class ModelPatcher(Protocol):
    """The part of ComfyUI's ModelPatcher that the nodes use."""

    model: Any  # the module whose layers are adapted
    model_options: dict[str, Any]

    def clone(self) -> "ModelPatcher": ...
    def get_key_patches(self, filter_prefix: str | None = None) -> Mapping[str, Any]: ...
    def get_attachment(self, key: str) -> Any: ...
    def set_attachments(self, key: str, attachment: object) -> None: ...
    def set_injections(self, key: str, injections: list[Any]) -> None: ...
    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., object]) -> None: ...
    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None: ...


class Clip(Protocol):
    """The part of ComfyUI's CLIP that the nodes use."""

    patcher: ModelPatcher
    cond_stage_model: Any
    tokenizer: Any

    def clone(self) -> "Clip": ...
    def tokenize(self, text: str) -> Tokens: ...
    def encode_from_tokens_scheduled(self, tokens: Tokens) -> Conditioning: ...


class ComfyBase:
    """A pipeline's components, for reading: `unet`, the text encoders and their tokenizers."""

    def __init__(self, model: ModelPatcher, clip: Clip) -> None:
        """Raises BaseMismatch for models of another kind than Stable Diffusion 1.x, 2.x and XL."""
        self.unet = _tree(model, unet_paths(model))
        for component, name in text_encoders(clip).items():
            encoder: Any = getattr(clip.cond_stage_model, name).transformer
            tree = _tree(clip.patcher, text_paths(clip, component))
            object.__setattr__(tree, "embeddings", encoder.get_input_embeddings())  # past nn.Module's registry
            setattr(self, component, tree)
            setattr(self, TOKENIZERS[component], getattr(clip.tokenizer, name).tokenizer)


def text_encoders(clip: Clip) -> dict[str, str]:
    """Component -> ComfyUI's name of the text encoder. Raises BaseMismatch for a CLIP of another kind."""
    names = [name for name, _ in clip.cond_stage_model.named_children()]
    if (family := tuple(sorted(names, reverse=True))) not in _TEXT_ENCODERS:
        raise BaseMismatch(
            f"This CLIP has the text encoders {', '.join(names) or 'of another kind'}; spectral adapters are for "
            "Stable Diffusion 1.x, 2.x and XL."
        )
    return dict(zip(TOKENIZERS, family, strict=False))


def widths(clip: Clip) -> dict[str, int]:
    """Component -> width of its embeddings."""
    embeddings = {
        component: getattr(clip.cond_stage_model, name).transformer.get_input_embeddings()
        for component, name in text_encoders(clip).items()
    }
    return {component: module.weight.shape[1] for component, module in embeddings.items()}


def unet_paths(model: ModelPatcher) -> dict[str, str]:
    """Canonical layer name -> path in ComfyUI's model. Raises BaseMismatch for a model without such a UNet."""
    from comfy.utils import unet_to_diffusers

    config: Any = model.model.model_config.unet_config
    table: Mapping[str, str] = unet_to_diffusers(config)
    if not table:
        raise BaseMismatch("This MODEL has no UNet of Stable Diffusion 1.x, 2.x or XL.")
    weights = {key.removesuffix(".weight"): path for key, path in table.items() if key.endswith(".weight")}
    return {canonical("unet", key): f"diffusion_model.{path.removesuffix('.weight')}" for key, path in weights.items()}


def text_paths(clip: Clip, component: str) -> dict[str, str]:
    """`unet_paths` of a text encoder."""
    name = text_encoders(clip)[component]
    encoder: nn.Module = getattr(clip.cond_stage_model, name).transformer
    layers = [path for path, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    return {canonical(component, path): f"{name}.transformer.{path}" for path in layers}


class _Tree(nn.Module):
    """A component whose layers stand under diffusers' paths."""

    embeddings: nn.Embedding

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings


def _tree(patcher: ModelPatcher, paths: Mapping[str, str]) -> _Tree:
    """The layers at `paths` (canonical name -> path) that a model has, with the weights of the base."""
    root, weights = _Tree(), patcher.get_key_patches()
    for name, path in paths.items():
        if (entry := weights.get(f"{path}.weight")) is None:
            continue  # the table has names that only some UNets have
        *levels, attribute = name.split(".")[1:]
        parent: nn.Module = root
        for level in levels:
            if level not in parent._modules:
                parent.add_module(level, nn.Module())
            parent = parent.get_submodule(level)
        parent.add_module(attribute, _with_weight(patcher.model.get_submodule(path), entry[0][0]))
    return root


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """The layer with the base's weight, which ComfyUI keeps aside where it has added a LoRA."""
    layer = copy.copy(module)
    layer._parameters = {**module._parameters, "weight": nn.Parameter(weight.detach(), requires_grad=False)}
    return layer
