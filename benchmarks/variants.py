"""The alternatives of a training step, on one pipeline: each can be installed and removed again.

Shapes: O out_features, I in_features, K all directions of a weight, R slice length.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.bases import Base
from fusion.adapters.layer_stacks import LayerStacks
from fusion.models.attachment import attach
from fusion.models.layer_sites import Site, sites
from fusion.spectral.spectrum import Spectrum


@dataclass(frozen=True)
class Variant:
    """Something to train: its parameters, all tensors it adds, and how it is installed in the pipeline."""

    parameters: list[nn.Parameter]
    tensors: list[Tensor]  # all that it adds to the base's, parameters among them
    installed: Callable[[], AbstractContextManager[object]]
    prompt: str | None = None  # encoded in the step; None: text is cached
    computed: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext  # around forward and backward


def frozen(_base: Base) -> Variant:
    """Nothing to train in the model; the gradient still reaches the prompt's embedding."""
    return Variant([], [], contextlib.nullcontext)


def ours(base: Base, kind: str, *, gated: bool = False) -> Variant:
    adapter = base.adapter(kind, gated=gated, unet_only=not gated, trained=False)
    parameters = list(adapter.parameters())
    if gated:
        rows = {
            token: {component: nn.Parameter(row) for component, row in components.items()}
            for token, components in adapter.tokens.items()
        }
        adapter = type(adapter)(adapter.info, adapter.branches, rows)
        parameters += [row for components in rows.values() for row in components.values()]
    stacks = LayerStacks(adapter.layers.values())
    tensors = [t for layer in adapter.layers.values() for t in layer.state_dict(keep_vars=True).values()]
    prompt = f"a photo of a {adapter.info.concepts[0].token}" if gated else None
    return Variant(
        parameters, tensors + parameters, lambda: attach(base.pipe, adapter, live=stacks), prompt, stacks.computed
    )


def peft_lora(base: Base) -> Variant:
    names = base.layers(gated=False, unet_only=True)
    config = LoraConfig(r=base.rank, lora_alpha=base.rank, target_modules=[n.removeprefix("unet.") for n in names])
    places = {name: site for name, site in sites(base.pipe).items() if name in names}
    layers = {name: site.module for name, site in places.items()}
    inject_adapter_in_model(config, base.pipe.unet)
    wrappers = {name: site.module for name, site in places.items()}
    _put(places, layers)
    del base.pipe.unet.peft_config
    for wrapper in wrappers.values():
        for parameter in (p for p in wrapper.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()  # as ours, whatever the base is in
    # The wrappers contain the base layers too: only what is trainable is LoRA's own.
    parameters = [p for module in wrappers.values() for p in module.parameters() if p.requires_grad]
    return Variant(parameters, list(parameters), lambda: _swapped(places, wrappers))


class DenseSpectralLinear(nn.Module):
    """The dense formulation, computed well: W' = (U + dU)(S + dS)(V + dV)ᵀ from whole factors at every call."""

    def __init__(self, spectrum: Spectrum, rank: int, bias: Tensor | None) -> None:
        super().__init__()
        self.U, self.S, self.V = spectrum  # (O, K), (K,), (I, K)
        self.bias = bias
        self.dU = nn.Parameter(torch.zeros(self.U.shape[0], rank))  # (O, R)
        self.dS = nn.Parameter(torch.zeros(rank))  # (R,)
        self.dV = nn.Parameter(torch.zeros(self.V.shape[0], rank))  # (I, R)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.product(*self.moved()), self.bias)

    def moved(self) -> Spectrum:
        rank = self.dS.shape[0]
        U = torch.cat([self.U[:, :rank] + self.dU, self.U[:, rank:]], dim=1)  # (O, K)
        S = torch.cat([self.S[:rank] + self.dS, self.S[rank:]])  # (K,)
        V = torch.cat([self.V[:, :rank] + self.dV, self.V[:, rank:]], dim=1)  # (I, K)
        return Spectrum(U, S, V)

    @staticmethod
    def product(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        """W', (O, I)."""
        return (U * S) @ V.T


class PaperSpectralLinear(DenseSpectralLinear):
    """The dense formulation as in the paper's own code, with a product with the (K, K) matrix diag(S)."""

    @staticmethod
    def product(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        return U @ S.diag() @ V.T


def dense(base: Base, kind: type[DenseSpectralLinear]) -> Variant:
    names = base.layers(gated=False, unet_only=True)
    places = {name: site for name, site in sites(base.pipe).items() if name in names}
    layers = {name: kind(base.spectra[name], base.rank, site.module.bias) for name, site in places.items()}
    parameters = [p for layer in layers.values() for p in (layer.dU, layer.dS, layer.dV)]
    factors = [t for name in names for t in base.spectra[name]]
    return Variant(parameters, parameters + factors, lambda: _swapped(places, layers))


@contextlib.contextmanager
def _swapped(places: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> Generator[None]:
    originals = {name: site.module for name, site in places.items()}
    _put(places, modules)
    yield
    _put(places, originals)


def _put(places: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> None:
    for name, site in places.items():
        setattr(site.parent, site.attribute, modules[name])


VARIANTS: dict[str, Callable[[Base], Variant]] = {
    "frozen base, gradient to the prompt": frozen,
    "PEFT LoRA": peft_lora,
    "additive": lambda base: ours(base, "additive"),
    "rotational": lambda base: ours(base, "rotational"),
    "additive, token-gated": lambda base: ours(base, "additive", gated=True),
    "dense": lambda base: dense(base, DenseSpectralLinear),
    "dense, the paper's code": lambda base: dense(base, PaperSpectralLinear),
}
