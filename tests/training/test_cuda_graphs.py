"""A step's kernels, captured with one batch and repeated for others, train the same adapter.

There is no GPU here: `recorded_kernels.Kernels` stands for CUDA graphs.
"""

import logging

import pytest
import torch
from recorded_kernels import Kernels
from toy_training import config, run, same

import tiny
from fusion.models import prompt_layout
from fusion.training import cuda_graphs, loop
from fusion.training.step import BatchGradients

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that Python computes."""
    calls, add = [], BatchGradients.add

    def counted(self, inputs, *, last):
        calls.append(last)
        return add(self, inputs, last=last)

    monkeypatch.setattr(prompt_layout, "has_fixed_kernels", lambda _: True)
    monkeypatch.setattr(BatchGradients, "add", counted)
    return calls


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(loop, "can_capture", lambda _: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraph", Kernels)
    monkeypatch.setattr(Kernels, "captured", 0)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd1", {"quiet_loss_weight": 1.0, "gradient_accumulation_steps": 2, "snr_gamma": 5.0}),
        ("sd1", {"adapter_type": "rotational", "gradient_checkpointing": True, "text_encoder_lr": 0, "token_lr": 0}),
        ("sdxl", {"targets": ["unet", "text_encoder", "text_encoder_2"], "clip_skip": 1, "train_batch_size": 1}),
    ],
)
def test_the_kernels_of_one_batch_train_with_all_others(family, settings, pictures, steps, monkeypatch, request):
    settings = config(pictures, max_train_steps=6, num_validation_images=0, **settings)
    _, eager = run(tiny.pipeline(family), settings)
    count, forms = len(steps), settings.gradient_accumulation_steps
    assert count == 6 * forms
    request.getfixturevalue("capturing")
    _, repeated = run(tiny.pipeline(family), settings)
    assert Kernels.captured == forms and len(steps) == count + 2 * forms  # each once without the graph, once for it
    assert same(eager, repeated)


def test_previews_have_the_memory_of_graphs_which_are_captured_anew(pictures, steps, capturing):
    settings = config(pictures, max_train_steps=4, num_validation_images=1, validation_steps=2)
    _, repeated = run(tiny.pipeline("sd1"), settings)
    assert Kernels.captured == 2
    _, eager = run(tiny.pipeline("sd1"), settings.updated({"cuda_graphs": False}))
    assert same(eager, repeated)


def test_a_graph_that_gives_other_gradients_is_not_used(pictures, steps, capturing, monkeypatch, caplog):
    settings = config(pictures, max_train_steps=3, num_validation_images=0)
    _, eager = run(tiny.pipeline("sd1"), settings.updated({"cuda_graphs": False}))
    failing = {"replay": lambda self: None, "capture": lambda self, function: torch.zeros(2) @ torch.zeros(3)}
    for name, method in failing.items():
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(Kernels, name, method)
            _, other = run(tiny.pipeline("sd1"), settings)
        assert same(eager, other)
        assert caplog.text.count("goes on without CUDA graphs") == 1
        caplog.clear()
