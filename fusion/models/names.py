"""Canonical layer names <-> live modules. The only place that knows how module paths vary.

`unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`, `text_encoder.encoder.layers.0.self_attn.q_proj`: the
component, then the path, without the levels that come and go (`text_model.` of older transformers, `_orig_mod.` of
torch.compile, `module.` of data parallelism, `base_layer.` of PEFT, whose own matrices are no layers of the base).
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import nn

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_PASSING_LEVELS = {"text_model", "_orig_mod", "module", "base_layer"}
_PEFT = "lora_"  # begins the levels that hold PEFT's own matrices


class Pipeline(Protocol):
    """The part of a diffusers Stable Diffusion pipeline that the toolkit touches."""

    unet: nn.Module


class Site(NamedTuple):
    """Where an adaptable layer hangs: `getattr(parent, attribute) is module`."""

    parent: nn.Module
    attribute: str
    module: nn.Module


def canonical(component: str, path: str) -> str:
    """The canonical name of the module at `path` below a component."""
    return ".".join([component, *(level for level in path.split(".") if level not in _PASSING_LEVELS)])


def component_of(layer: str) -> str:
    return layer.partition(".")[0]


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
