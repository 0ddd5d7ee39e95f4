"""Adapters at toy size with every parameter off its start, as training would leave them; and pictures from them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept, content
from fusion.adapters.layer import AdapterLayer, LayerOptions
from fusion.models.attachment import attach
from fusion.models.layer_sites import components, matrix, sites
from fusion.models.pipelines import base_info
from fusion.models.targets import default_targets, resolve
from fusion.models.tokens import initial_rows
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum, decompose

OPTIONS = LayerOptions(seed=3, guard=24)


_spectra: dict[bytes, Spectrum] = {}


def spectrum_of(weight: Tensor) -> Spectrum:
    """decompose(), once for equal weights: toy pipelines are built anew for every test."""
    key = hashlib.sha256(f"{weight.shape} {weight.dtype}".encode() + content(weight)).digest()
    if key not in _spectra:
        _spectra[key] = decompose(weight)
    return _spectra[key]


def moved(layer: AdapterLayer, scale: float = 0.3) -> AdapterLayer:
    """Add noise to every parameter, in place."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return layer


def trained_layer(kind: str, weight: Tensor, k: int = 0, rank: int = 4, scale: float = 0.3) -> AdapterLayer:
    return moved(ADAPTERS[kind].fresh(weight, SpectralSlice.contiguous(k, rank), options=OPTIONS), scale)


def fresh_adapter(
    pipe,
    token: str = "<rex>",
    *,
    kind: str = "additive",
    k: int = 0,
    rank: int = 4,
    targets: Sequence[str] | None = None,
    gated: bool = True,
    vectors: int = 1,
) -> Adapter:
    """An untrained adapter of one branch for this pipeline; its token's embedding starts from 'dog'."""
    places, concept = sites(pipe), Concept(token, "dog", vectors)
    weights = {n: matrix(places[n]) for n in resolve(targets or default_targets(components(pipe), gated=gated), places)}
    part, type_ = SpectralSlice.contiguous(k, rank), ADAPTERS[kind]
    layers = {name: type_.fresh(w, part, spectrum=spectrum_of(w), options=OPTIONS) for name, w in weights.items()}
    slices = (part,) if type_.slice_of else ()
    branch = Branch(token, kind, layers, slices, tuple(targets or ()), (token,) if gated else ())
    info = AdapterInfo(token.strip("<>"), base_info(pipe), (concept,))
    return Adapter(info, (branch,), {token: initial_rows(pipe, concept)})


def trained_adapter(pipe, token: str = "<rex>", *, scale: float = 0.3, **options) -> Adapter:
    """The same with random layers, and a random embedding of the size of the base's own."""
    adapter = fresh_adapter(pipe, token, **options)
    for layer in adapter.layers.values():
        moved(layer, scale)
    for row in adapter.tokens[token].values():
        row.add_(torch.randn_like(row) * row.std())
    return adapter


def everywhere(pipe) -> list[str]:
    """Targets that name every layer an adapter can change."""
    return list(sites(pipe))


def draw(pipe, prompt: str | list[str] | None = "a photo of a dog", seed: int = 0, **options) -> Tensor:
    """Final latents (B, C, H, W) of an ordinary pipeline call."""
    options = {"num_inference_steps": 2, "guidance_scale": 3.0} | options
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="latent", **options).images


@contextmanager
def attached(pipe, *adapters: Adapter, gating: str | None = None) -> Iterator[None]:
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(attach(pipe, adapter, gating))
        yield
