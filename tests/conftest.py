"""For every test: offline, silent about itself, deterministic, one thread."""

import gc
import os
import random
import shutil

# Before torch, gradio or the hub client read them; tests that start processes hand them on.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until everything is imported: importing takes a fifth less

import numpy as np
import pytest
import torch
from hypothesis import settings

import tiny

torch.set_num_threads(1)
settings.register_profile("laws", derandomize=True, deadline=None)
settings.load_profile("laws")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run what is marked long")
    group = parser.getgroup("campaign", "tests/campaign: kills, bad targets, fuzz, races, soak")
    group.addoption("--campaign", type=float, default=0, metavar="MINUTES", help="the long form (default: a sample)")
    group.addoption("--campaign_seed", type=int, default=0, metavar="N", help="of kills, inputs and races (default: 0)")
    group.addoption("--soak", type=float, default=0, metavar="HOURS", help="attach, draw, train, detach for so long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """From here on the garbage collector leaves out what is imported: half a million objects, 0.3 s each time."""
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def equal_seeds():
    """A test that forgets to seed still draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def few_steps(monkeypatch):
    """Three denoising steps where a test sets none, as if the toy base's `fusion.toml` said so."""
    values = {"generation": {"steps": 3}}
    monkeypatch.setattr("fusion.models.pipelines.read_base_defaults", lambda _, table: values.get(table, {}))


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def pipe(family):
    """A fresh toy pipeline, once for each family."""
    return tiny.pipeline(family)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium, for `playwright.chromium.launch(executable_path=...)`."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine: the browser tests need one")
