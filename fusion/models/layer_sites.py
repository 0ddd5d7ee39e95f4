"""Where the adaptable layers of a pipeline are: canonical layer name -> its parent module and attribute.

PEFT's own matrices and an IP-Adapter's layers are no layers of the base and are left out, as are the copies that
`fuse_qkv_projections` makes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fusion.errors import BaseMismatch
from fusion.layer_names import COMPONENTS, canonical
from fusion.models.adapted_layers import base_of
from fusion.models.pipeline import Pipeline, uncompiled

_PEFT = "lora_"  # begins the levels that hold PEFT's own matrices
_FUSED = ("to_qkv", "to_kv")
_IP_ADAPTER = {"processor", "encoder_hid_proj"}  # levels that hold an IP-Adapter's layers
_TABLE = "_spectral_fusion_sites"  # the attribute of a component that keeps its table


class Site(NamedTuple):
    """The position of an adaptable layer: its parent module and the attribute there."""

    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        """The layer that is there now: the base's own, or with adapters attached to it."""
        return getattr(self.parent, self.attribute)


def components(pipe: Pipeline) -> dict[str, nn.Module]:
    """The adaptable submodels this pipeline has, in the order of COMPONENTS."""
    modules = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Module)}


def adaptable(module: nn.Module) -> bool:
    """A weight that is one matrix: a linear layer, or a 1x1 convolution without groups."""
    if isinstance(module, nn.Conv2d):
        plain = module.stride == (1, 1) and module.padding == (0, 0)
        return module.kernel_size == (1, 1) and module.groups == 1 and plain
    return isinstance(module, nn.Linear)


def is_convolution(module: nn.Module) -> bool:
    """A convolution of a larger kernel: imported adapters may change it, trained ones do not."""
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.dilation == (1, 1)
    return plain and not adaptable(module) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def sites(pipe: Pipeline) -> dict[str, Site]:
    """Every adaptable layer of a pipeline under its canonical name. Modules are walked again only when they change."""
    return {name: site for name, site in all_sites(pipe).items() if adaptable(site.module)}


def all_sites(pipe: Pipeline) -> dict[str, Site]:
    """`sites`, and the convolutions of larger kernels."""
    table: dict[str, Site] = {}
    for component, root in components(pipe).items():
        module = uncompiled(root)
        walked = module.__dict__.get(_TABLE)
        if walked is None or not walked.holds(component):
            walked = _Table(component, module)
            object.__setattr__(module, _TABLE, walked)
        table |= walked.sites
    return table


class _Table:
    """The sites of one component, with the tree of modules they were found in."""

    def __init__(self, component: str, root: nn.Module) -> None:
        self.component, self.sites = component, dict(walk(component, root))
        self._tree = [(module, _children(module)) for module in map(base_of, root.modules())]

    def holds(self, component: str) -> bool:
        """Whether the tree is the same, module by module, but for what this toolkit has attached."""
        return component == self.component and all(
            list(module._modules.values()) == children or _children(module) == children
            for module, children in self._tree
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the component has modules of its own


def _children(module: nn.Module) -> list[nn.Module | None]:
    return [child and base_of(child) for child in module._modules.values()]


def walk(component: str, root: nn.Module) -> Iterator[tuple[str, Site]]:
    """The sites below a component, by a walk over all of its modules."""
    for path, parent in root.named_modules():
        if any(level.startswith(_PEFT) or level in _IP_ADAPTER for level in path.split(".")):
            continue
        for attribute, module in parent.named_children():
            if (adaptable(module) or is_convolution(module)) and attribute not in _FUSED:
                yield canonical(component, f"{path}.{attribute}" if path else attribute), Site(parent, attribute)


def matrix(site: Site) -> torch.Tensor:
    """The base weight at a site as (O, I); of a convolution as (O, I·K), K cells of its kernel.

    Raises BaseMismatch for a quantised layer, unless its weight can give back the numbers it stands for.
    """
    module = base_of(site.module)
    weight: Any = module.weight
    if not weight.is_floating_point() or weight.element_size() < 2:
        kind = f"{type(module).__name__}, {str(weight.dtype).removeprefix('torch.')}"
        raise BaseMismatch(
            f"The layer '{site.attribute}' of this base is quantised ({kind}), and adapters need its weight: open the "
            "base in float16 or bfloat16, without quantization_config and without layerwise casting."
        )
    weight = weight.detach()
    return (weight.dequantize() if is_quantised(weight) else weight).flatten(1)


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor that stands for others, as torchao's and quanto's."""
    return type(weight) not in (torch.Tensor, nn.Parameter) and hasattr(type(weight), "__tensor_flatten__")
