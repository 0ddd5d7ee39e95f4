"""Adapters with random trained values on the toy pipelines."""

import pytest
import torch

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept, Provenance
from fusion.adapters.layer import LayerOptions
from fusion.models.layer_sites import components, matrix, sites
from fusion.models.pipelines import base_info
from fusion.models.targets import default_targets, resolve
from fusion.models.tokens import initial_rows
from fusion.spectral.slices import SpectralSlice

WIDE = ("unet.attn1", "unet.attn2", "unet.ff", "unet.proj_in", "unet.proj_out")


def make(
    pipe, kind="additive", *, token="<rex>", noun="dog", k=0, rank=4, vectors=1, gated=True, targets=None, scale=0.1
):
    """An adapter of one branch, every parameter moved off its start."""
    places, concept = sites(pipe), Concept(token, noun, vectors)
    names = resolve(targets or default_targets(components(pipe), gated=gated), places)
    part = SpectralSlice.contiguous(k, rank)
    layers = {name: ADAPTERS[kind].fresh(matrix(places[name]), part, options=LayerOptions(k, 8)) for name in names}
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)
    slices = (part,) if ADAPTERS[kind].slice_of else ()
    branch = Branch(noun, kind, layers, slices, tuple(targets or ()), (token,) if gated else ())
    info = AdapterInfo(noun, base_info(pipe), (concept,), Provenance("test", 7, 3, (), {"learning_rate": 1e-3}))
    return Adapter(info, (branch,), {token: initial_rows(pipe, concept)})


def together(*adapters, strengths=None):
    """Their branches side by side, as a fusion by a linear method leaves them."""
    strengths = strengths or [1.0] * len(adapters)
    branches = tuple(
        Branch(b.name, b.type, b.layers, b.slices, b.targets, b.gate, s)
        for a, s in zip(adapters, strengths, strict=True)
        for b in a.branches
    )
    info = AdapterInfo(
        "+".join(a.info.name for a in adapters),
        adapters[0].info.base,
        tuple(c for a in adapters for c in a.info.concepts),
        Provenance("fuse", parents=tuple(a.info.name for a in adapters)),
    )
    return Adapter(info, branches, {t: rows for a in adapters for t, rows in a.tokens.items()})


@pytest.fixture
def trained():
    return make


@pytest.fixture
def side_by_side():
    return together


@pytest.fixture
def wide():
    """Targets of every kind of layer in the UNet and the text encoders."""
    return lambda pipe: [*WIDE, *(f"{c}{end}" for c in components(pipe) if c != "unet" for end in ("", ".mlp"))]
