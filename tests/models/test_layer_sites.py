"""Canonical names are the same whatever wraps a model (law 12)."""

import pytest
import torch
from torch import nn

import tiny
from fusion.layer_names import canonical, component_of
from fusion.models.attachment import attach
from fusion.models.layer_sites import adaptable, components, sites
from fusion.models.pipelines import base_info, family
from trained import draw, trained_adapter


def test_every_site_is_what_its_name_says(pipe):
    found = sites(pipe)
    assert len(found) > 50
    for name, site in found.items():
        assert getattr(site.parent, site.attribute) is site.module
        path = name.removeprefix(component_of(name) + ".")
        inner = {
            canonical(component_of(name), p)
            for p, m in components(pipe)[component_of(name)].named_modules()
            if m is site.module
        }
        assert inner == {name} and name.endswith(site.attribute) and "text_model" not in path
    assert len({id(site.module) for site in found.values()}) == len(found)


def test_resolving_a_name_gives_the_layer_whose_name_it_is(pipe):
    by_module = {id(site.module): name for name, site in sites(pipe).items()}
    for component, part in components(pipe).items():
        for path, module in part.named_modules():
            if adaptable(module):
                assert by_module[id(module)] == canonical(component, path)


@pytest.mark.parametrize("level", ["_orig_mod", "module"])
def test_wrappers_leave_no_mark(level, pipe):
    names = list(sites(pipe))
    for component in components(pipe):
        setattr(pipe, component, nn.ModuleDict({level: getattr(pipe, component)}))
    assert list(sites(pipe)) == names


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_keep_their_names(pipe, family):
    names, info = list(sites(pipe)), base_info(pipe)
    for component in components(pipe):
        setattr(pipe, component, torch.compile(getattr(pipe, component), backend="eager"))
    assert list(sites(pipe)) == names and base_info(pipe) == info


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_both_clip_layouts_have_the_same_names_and_take_the_same_adapter(family):
    new, old = tiny.pipeline(family), tiny.pipeline(family)
    old.register_modules(text_encoder=tiny.old_clip_layout(old.text_encoder))
    assert list(sites(new)) == list(sites(old))
    assert any("text_model" in path for path, _ in old.text_encoder.named_modules())
    adapter, pictures = trained_adapter(new), []
    for pipe in (new, old):
        with attach(pipe, adapter):
            pictures.append(draw(pipe, "a <rex>"))
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    "module, answer",
    [
        (nn.Linear(4, 6), True),
        (nn.Conv2d(4, 6, 1), True),
        (nn.Conv2d(4, 6, 3), False),
        (nn.Conv2d(4, 6, 1, groups=2), False),
        (nn.Conv2d(4, 6, 1, stride=2), False),
        (nn.Conv2d(4, 6, 1, padding=1), False),
        (nn.Conv1d(4, 6, 1), False),
        (nn.Embedding(4, 6), False),
        (nn.LayerNorm(4), False),
    ],
)
def test_a_weight_that_is_one_matrix_can_be_adapted(module, answer):
    assert adaptable(module) is answer


def test_a_component_that_is_absent_has_no_layers():
    pipe = tiny.pipeline("sdxl")
    pipe.text_encoder = None
    assert list(components(pipe)) == ["unet", "text_encoder_2"]
    assert not [name for name in sites(pipe) if component_of(name) == "text_encoder"]
    assert family(pipe) == "sdxl"
