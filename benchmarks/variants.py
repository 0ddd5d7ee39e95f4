"""The alternatives of a training step, on one pipeline: each can be put in and taken out again.

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
from fusion.models.attachment import attach
from fusion.models.layer_sites import Site, sites
from fusion.spectral.spectrum import Spectrum


@dataclass(frozen=True)
class Variant:
    """Something to train: what is optimised, what it keeps beside the base, and how to put it into the pipeline."""

    parameters: list[nn.Parameter]
    kept: list[Tensor]  # every tensor it adds to the base's, parameters among them
    installed: Callable[[], AbstractContextManager[object]]
    prompt: str | None = None  # encoded in the step; None: text is cached


def frozen(_base: Base) -> Variant:
    """Nothing to train in the model; the gradient still travels down to the prompt's embedding."""
    return Variant([], [], contextlib.nullcontext)


def ours(base: Base, kind: str, *, gated: bool = False) -> Variant:
    adapter = base.adapter(kind, gated=gated, unet_only=not gated, trained=False)
    parameters = list(adapter.parameters())
    if gated:
        rows = {
            token: {component: nn.Parameter(row) for component, row in of.items()}
            for token, of in adapter.tokens.items()
        }
        adapter = type(adapter)(adapter.info, adapter.branches, rows)
        parameters += [row for of in rows.values() for row in of.values()]
    kept = [t for layer in adapter.layers.values() for t in layer.state_dict(keep_vars=True).values()]
    prompt = f"a photo of a {adapter.info.concepts[0].token}" if gated else None
    return Variant(parameters, kept + parameters, lambda: attach(base.pipe, adapter, live=True), prompt)


def peft_lora(base: Base) -> Variant:
    names = base.layers(gated=False, unet_only=True)
    config = LoraConfig(r=base.rank, lora_alpha=base.rank, target_modules=[n.removeprefix("unet.") for n in names])
    originals = {name: site for name, site in sites(base.pipe).items() if name in names}
    inject_adapter_in_model(config, base.pipe.unet)
    wrapped = {name: getattr(site.parent, site.attribute) for name, site in originals.items()}
    for site in originals.values():
        setattr(site.parent, site.attribute, site.module)
    del base.pipe.unet.peft_config
    # The wrappers hold the base layers too: only what is trainable is LoRA's own.
    parameters = [p for module in wrapped.values() for p in module.parameters() if p.requires_grad]
    return Variant(parameters, list(parameters), lambda: _swapped(originals, wrapped))


class DenseSpectralLinear(nn.Module):
    """The dense formulation at its best: W' = (U + dU)(S + dS)(V + dV)ᵀ from whole factors at every call."""

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
    """The dense formulation as the paper's own code has it, with a product with the (K, K) matrix diag(S)."""

    @staticmethod
    def product(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        return U @ S.diag() @ V.T


def dense(base: Base, kind: type[DenseSpectralLinear]) -> Variant:
    names = base.layers(gated=False, unet_only=True)
    originals = {name: site for name, site in sites(base.pipe).items() if name in names}
    layers = {name: kind(base.spectra[name], base.rank, site.module.bias) for name, site in originals.items()}
    parameters = [p for layer in layers.values() for p in (layer.dU, layer.dS, layer.dV)]
    whole = [t for name in names for t in base.spectra[name]]
    return Variant(parameters, parameters + whole, lambda: _swapped(originals, layers))


@contextlib.contextmanager
def _swapped(originals: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> Generator[None]:
    for name, site in originals.items():
        setattr(site.parent, site.attribute, modules[name])
    yield
    for site in originals.values():
        setattr(site.parent, site.attribute, site.module)


VARIANTS: dict[str, Callable[[Base], Variant]] = {
    "frozen base, gradient to the prompt": frozen,
    "PEFT LoRA": peft_lora,
    "additive": lambda base: ours(base, "additive"),
    "rotational": lambda base: ours(base, "rotational"),
    "additive, token-gated": lambda base: ours(base, "additive", gated=True),
    "dense": lambda base: dense(base, DenseSpectralLinear),
    "dense, the paper's code": lambda base: dense(base, PaperSpectralLinear),
}
