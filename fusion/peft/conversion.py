"""Spectral adapters of a model as a LoRA that PEFT itself loads, and as adapters of this toolkit's own files.

Shapes: O out_features, I in_features, Q rank of a delta.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, BaseInfo, Branch, float32
from fusion.errors import ConfigError, UnknownName, closest
from fusion.formats.safetensors_file import write_file
from fusion.layer_names import canonical, is_importable
from fusion.peft.config import SpectralConfig
from fusion.peft.layer import SpectralLinear
from fusion.spectral.slices import SpectralSlice

_PREFIX = "base_model.model."


def save_as_lora(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Write one adapter as a LoRA in PEFT's layout: exact, without an SVD, of rank 2R for additive adapters.

    vLLM, SGLang and others that read only LoRA can use it. Modules of `modules_to_save` are written too.
    """
    config, layers = _adapter(model, adapter_name)
    with torch.no_grad():
        deltas = {path: layer.delta(adapter_name) for path, layer in layers.items()}
    rank = max(delta.rank for delta in deltas.values())
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    others = {key.removeprefix(_PREFIX): value for key, value in state.items() if ".spectral_layers." not in key}
    tensors = {_PREFIX + key: value for key, value in others.items()}
    for path, delta in deltas.items():
        rows, columns = delta.down.new_zeros(rank, delta.shape[1]), delta.up.new_zeros(delta.shape[0], rank)
        rows[: delta.rank], columns[:, : delta.rank] = delta.down, delta.up  # (Q, I), (O, Q)
        base, name = layers[path].get_base_layer(), _PREFIX + path
        if isinstance(base, nn.Conv2d):
            rows, columns = rows.reshape(rank, *base.weight.shape[1:]), columns[:, :, None, None]
        tensors |= {f"{name}.lora_A.weight": rows.contiguous(), f"{name}.lora_B.weight": columns.contiguous()}
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layers),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    write_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME, tensors, {"format": "pt"}, "float32")
    lora.save_pretrained(str(folder))


def to_adapter(
    model: nn.Module, adapter_name: str = "default", *, component: str = "unet", base: BaseInfo | None = None
) -> Adapter:
    """An adapter of a UNet or text encoder as `fusion.save`, `attach` and `fuse` take it: ungated, with a copy of it.

    `component`: what the pipeline calls the model (unet, text_encoder, text_encoder_2). Raises ConfigError for layers
    that Stable Diffusion does not have.
    """
    config, layers = _adapter(model, adapter_name)
    names = {path: canonical(component, path) for path in layers}
    if foreign := [name for name in names.values() if not is_importable(name)]:
        raise ConfigError(f"{foreign[0]} is no layer of Stable Diffusion, so there is no adapter file for it.")
    strengths = {layer.strengths[adapter_name] for layer in layers.values()}
    if len(strengths) > 1:
        raise ConfigError(f"The layers of adapter '{adapter_name}' have different strengths; set one with set_scale.")
    branch = Branch(
        name=adapter_name,
        type=config.adapter_type,
        layers={names[path]: float32(deepcopy(layer.adapter_layer(adapter_name))) for path, layer in layers.items()},
        slices=(config.directions,) if config.layer_class.slice_of else (),
        targets=tuple(names.values()),
        strength=strengths.pop(),
    )
    return Adapter(AdapterInfo(adapter_name, base), (branch,), {})


def add_native_adapter(
    model: nn.Module, adapter: Adapter, adapter_name: str = "default", *, component: str = "unet"
) -> None:
    """Add an adapter of this toolkit to a UNet or text encoder as PEFT's: the reverse of `to_adapter`.

    Raises ConfigError for what PEFT cannot have: gates, several branches, types that are not trained here.
    """
    branches = [branch for branch in adapter.branches if any(_of(name, component) for name in branch.layers)]
    name = adapter.info.name
    if len(branches) != 1 or branches[0].gate:
        raise ConfigError(
            f"'{name}' has {len(branches)} branches for the {component}, {sum(bool(b.gate) for b in branches)} of them "
            "gated; PEFT knows no tokens, so only one branch without a gate can be added. Use fusion.attach for gates."
        )
    branch = branches[0]
    if branch.type not in ADAPTERS:
        raise ConfigError(f"'{name}' is of type {branch.type}, which is not trained here; load it with PEFT itself.")
    paths = {canonical(component, path): path for path, _ in model.named_modules()}
    layers = {layer: tensors for layer, tensors in branch.layers.items() if _of(layer, component)}
    if absent := sorted({*layers} - {*paths}):
        raise ConfigError(f"'{name}' changes {absent[0]}, which this model does not have.")
    part = branch.slices[0] if branch.slices else SpectralSlice(0, _rank(branch))
    if part.step != 1 or part.start % part.rank or len(branch.slices) > 1:
        raise ConfigError(
            f"'{name}' owns directions {part}; a SpectralConfig has neighbouring ones only, from a multiple of r on."
        )
    config = SpectralConfig(
        r=part.rank,
        adapter_type=branch.type,
        slice=part.start // part.rank if branch.slices else None,
        target_modules=[paths[layer] for layer in layers],
        basis="file",
    )
    inject_adapter_in_model(config, model, adapter_name)
    for layer, tensors in layers.items():
        target = model.get_submodule(paths[layer])
        assert isinstance(target, SpectralLinear)
        state = {key: tensor.float() for key, tensor in tensors.state_dict().items()}
        target.check_basis(layer, config, state)
        target.spectral_layers[adapter_name].load_state_dict(state)
        target.strengths[adapter_name] = branch.strength
        target.mark_checked(adapter_name)


def _of(layer: str, component: str) -> bool:
    return layer.startswith(f"{component}.")


def _rank(branch: Branch) -> int:
    return max(layer.delta().rank for layer in branch.layers.values())


def _adapter(model: nn.Module, adapter_name: str) -> tuple[SpectralConfig, dict[str, SpectralLinear]]:
    """The config of one adapter, and its layers by their paths in the base."""
    configs: Mapping[str, object] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, SpectralConfig):
        spectral = [name for name, other in configs.items() if isinstance(other, SpectralConfig)]
        known = f"{closest(adapter_name, spectral)} There are: {', '.join(spectral) or 'none'}."
        raise UnknownName(f"This model has no spectral adapter '{adapter_name}'{known}")
    layers: dict[str, SpectralLinear] = {
        path.removeprefix(_PREFIX): module
        for path, module in model.named_modules()
        if isinstance(module, SpectralLinear) and adapter_name in module.spectral_layers
    }
    return config, layers
