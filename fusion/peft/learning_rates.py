"""Learning rates for spectral adapters."""

from typing import Any

import torch
from torch import nn

from fusion.adapters.layer import SpectralLayer
from fusion.errors import ConfigError
from fusion.peft.layer import SpectralLinear


def parameter_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: rates that make a slice of small singular values learn as fast as the strongest one.

    What is trained beside the adapters (`modules_to_save`) has the plain rate. Raises ConfigError where nothing is.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    adapted: set[int] = set()
    for module in (module for module in model.modules() if isinstance(module, SpectralLinear)):
        for layer in map(module.adapter_layer, module.spectral_layers):
            trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
            adapted |= {id(parameter) for parameter in trained.values()}
            if trained:
                owns = isinstance(layer, SpectralLayer)
                gains = layer.learning_rate_gains(module.strongest(len(layer.basis.S)) if owns else torch.ones(0))
                for name, parameter in trained.items():
                    groups.setdefault(gains[name], []).append(parameter)
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in adapted]
    if others:
        groups.setdefault(1.0, []).extend(others)
    if not groups:
        raise ConfigError("No parameter of this model is trained; load the adapter with is_trainable=True.")
    return [{"params": parameters, "lr": learning_rate * gain} for gain, parameters in sorted(groups.items())]
