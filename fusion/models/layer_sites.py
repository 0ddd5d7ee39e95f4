"""Where the adaptable layers of a pipeline are: canonical layer name -> module, its parent and attribute.

PEFT's own matrices are no layers of the base and are left out.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from fusion.layer_names import COMPONENTS, canonical
from fusion.models.pipeline import Pipeline

_PEFT = "lora_"  # begins the levels that hold PEFT's own matrices


class Site(NamedTuple):
    """Where an adaptable layer hangs: `getattr(parent, attribute) is module`."""

    parent: nn.Module
    attribute: str
    module: nn.Module


def components(pipe: Pipeline) -> dict[str, nn.Module]:
    """The adaptable submodels this pipeline has, in the order of COMPONENTS."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def adaptable(module: nn.Module) -> bool:
    """A weight that is one matrix: a linear layer, or a 1x1 convolution without groups."""
    if isinstance(module, nn.Conv2d):
        plain = module.stride == (1, 1) and module.padding == (0, 0)
        return module.kernel_size == (1, 1) and module.groups == 1 and plain
    return isinstance(module, nn.Linear)


def sites(pipe: Pipeline) -> dict[str, Site]:
    """Every adaptable layer of a pipeline under its canonical name."""
    return {name: site for component, root in components(pipe).items() for name, site in _walk(component, root)}


def _walk(component: str, root: nn.Module) -> Iterator[tuple[str, Site]]:
    for path, parent in root.named_modules():
        if any(level.startswith(_PEFT) for level in path.split(".")):
            continue
        for attribute, module in parent.named_children():
            if adaptable(module):
                yield (
                    canonical(component, f"{path}.{attribute}" if path else attribute),
                    Site(parent, attribute, module),
                )


def matrix(site: Site) -> torch.Tensor:
    """The base weight at a site as (O, I)."""
    weight = site.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().flatten(1)
