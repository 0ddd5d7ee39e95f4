"""Deterministic kernels: asked for while a training lasts, and no longer."""

import os

import pytest
import torch
from toy_training import config, run, same

import fusion
import tiny
from fusion.errors import ConfigError
from fusion.training.determinism import deterministic_algorithms

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_training_computes_the_same_with_them_and_leaves_no_setting(pictures, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    pipe = tiny.pipeline("sd1")
    _, expected = run(pipe, config(pictures))
    training = fusion.train(pipe, config(pictures, deterministic=True))
    steps = [(step, torch.are_deterministic_algorithms_enabled()) for step in training]
    assert all(on for _, on in steps) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    trained = fusion.training.setup.named_parameters(steps[-1][0].adapter)
    assert same(expected, trained) and not torch.are_deterministic_algorithms_enabled()
    training = fusion.train(pipe, config(pictures, deterministic=True))
    next(training)
    training.close()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_adds_in_any_order_is_named():
    values, places = torch.zeros(2), torch.tensor([0])
    sentence = "deterministic = true: put_ of PyTorch adds in any order; leave it out"
    with pytest.raises(ConfigError, match=sentence), deterministic_algorithms(True):
        values.put_(places, torch.ones(1))
    with deterministic_algorithms(False):
        assert values.put_(places, torch.ones(1)).tolist() == [1, 0]
