"""The stored basis recognises its base: silent, a warning, or a refusal with names and numbers (law 10)."""

import logging
from dataclasses import replace

import pytest
import torch

import tiny
from fusion.adapters import ADAPTERS
from fusion.adapters.layer import SpectralLayer
from fusion.errors import BaseMismatch
from fusion.models.attachment import attach
from fusion.models.baking import bake
from fusion.models.base_check import allow_other_bases, check_base
from fusion.models.layer_sites import sites
from trained import everywhere, trained_adapter

spectral = pytest.mark.parametrize("kind", [k for k, c in ADAPTERS.items() if issubclass(c, SpectralLayer)])


def ours(caplog):
    return [record for record in caplog.records if record.name.startswith("fusion.")]


def disturb(pipe, share):
    for site in sites(pipe).values():
        weight = site.module.weight.data
        noise = torch.randn_like(weight)
        weight += share * noise * weight.norm() / noise.norm()
    return pipe


@pytest.mark.parametrize("k", [0, 3, 7])
def test_the_same_base_is_silent_in_every_precision_and_with_a_little_noise(k, caplog):
    adapter = trained_adapter(tiny.pipeline("sd1"), k=k, targets=everywhere(tiny.pipeline("sd1"))[:40])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe = tiny.pipeline("sd1")
        pipe.unet.to(dtype)
        pipe.text_encoder.to(dtype)
        check_base(pipe, adapter)
    check_base(disturb(tiny.pipeline("sd1"), 0.01), adapter)
    assert not ours(caplog)


@pytest.mark.parametrize("k", [0, 3, 7])
def test_a_relative_of_the_base_is_warned_about(k, caplog):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, k=k)
    with caplog.at_level(logging.WARNING):
        attach(disturb(pipe, 0.1), adapter).detach()
    (record,) = ours(caplog)
    assert "'rex' was trained on a relative of this base (residual 0." in record.getMessage()
    assert any(name in record.getMessage() for name in adapter.layer_names)


@spectral
@pytest.mark.parametrize("k", [0, 7])
def test_a_stranger_is_refused_by_layer_and_number(kind, k, pipe, family):
    adapter = trained_adapter(pipe, kind=kind, k=k)
    stranger = tiny.pipeline(family, seed=1)
    for act in (attach, bake):
        with pytest.raises(BaseMismatch, match=r"'rex' does not fit.*residual [01]\.\d+ at \S+attn\S* \(limit 0\.3\)"):
            act(stranger, adapter, gating="none")


@pytest.mark.parametrize("other", ["sd2", "sdxl"])
def test_another_family_is_refused_by_shape_or_missing_layer(other):
    pipe, foreign = tiny.pipeline("sd1"), tiny.pipeline(other)
    for kind in ADAPTERS:
        with pytest.raises(BaseMismatch, match=r"(is \(\d+, \d+\) here and|which this base does not have)"):
            attach(foreign, trained_adapter(pipe, kind=kind))
    xl = trained_adapter(tiny.pipeline("sdxl"), targets=["text_encoder_2"])
    with pytest.raises(BaseMismatch, match=r"text_encoder_2.*which this base does not have\. It was trained on"):
        attach(pipe, xl)


def test_another_base_of_the_same_shapes_can_be_allowed_and_is_warned_about(caplog):
    pipe, adapter = tiny.pipeline("sd1", seed=5), trained_adapter(tiny.pipeline("sd1"))
    allow_other_bases(pipe)
    for _ in range(2):
        attach(pipe, adapter).detach()
    messages = [record.getMessage() for record in ours(caplog)]
    assert len(messages) == 2 and all("'rex' was trained on another base (residual" in text for text in messages)
    other = tiny.pipeline("sd2")
    allow_other_bases(other)
    with pytest.raises(BaseMismatch, match=r"here and .* in the adapter|which this base does not have"):
        attach(other, adapter)


def test_a_basis_that_is_no_number_is_refused():
    pipe = tiny.pipeline("sd1")
    allow_other_bases(pipe)
    adapter = trained_adapter(pipe)
    adapter.layers[adapter.layer_names[3]].basis.S.fill_(float("nan"))
    with pytest.raises(BaseMismatch, match=f"residual inf at {adapter.layer_names[3]}"):
        attach(pipe, adapter)


def test_layers_of_zeros_fit_themselves():
    # Bases are published with projections that were never trained away from their zero start.
    pipe = tiny.pipeline("sd1")
    for name, site in sites(pipe).items():
        if "proj_out" in name:
            site.module.weight.data.zero_()
    attach(pipe, trained_adapter(pipe, targets=["unet.proj_out"])).detach()


def test_weights_that_are_elsewhere_are_not_compared():
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe)
    pipe.unet.to("meta")
    with pytest.raises(BaseMismatch, match=r"no weight here now.*enable_model_cpu_offload"):
        attach(pipe, adapter)


def test_half_precision_files_recognise_their_base(caplog):
    pipe = tiny.pipeline("sd1")
    adapter = trained_adapter(pipe, k=3)
    for dtype in (torch.float16, torch.bfloat16):
        layers = {
            name: type(layer).from_tensors({k: t.to(dtype) for k, t in layer.state_dict().items()})
            for name, layer in adapter.layers.items()
        }
        check_base(pipe, replace(adapter, branches=(replace(adapter.branches[0], layers=layers),)))
    assert not ours(caplog)
