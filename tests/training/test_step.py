"""A training step's kernels depend on shapes alone: nothing is read back, and prompts are known before."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import config

import fusion
import tiny
from fusion.models import prompt_layout
from fusion.models.attachment import attach
from fusion.models.denoising import encode_batch, encode_prompts, predict
from fusion.models.prompt_layout import prepared, prompt_batch
from fusion.training.step import BatchGradients
from trained import trained_adapter

pytestmark = pytest.mark.usefixtures("shared_cache")


class Reads(TorchDispatchMode):
    """The operators of a block that a GPU's host waits for, or whose output's shape depends on values."""

    NAMES = frozenset(
        (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "unique_dim",
            "equal",
            "is_nonzero",
            "lift_fresh",
        )
    )

    def __init__(self):
        super().__init__()
        self.names, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            part.dtype == torch.bool for arg in args if isinstance(arg, list) for part in arg if part is not None
        )
        self.count += 1
        if name in self.NAMES or masks:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd1", {"quiet_loss_weight": 1.0, "num_vectors": 2}),
        ("sd1", {"gating": "none", "adapter_type": "rotational", "text_encoder_lr": 0.0, "token_lr": 0.0}),
        ("sdxl", {"targets": ["unet", "text_encoder", "text_encoder_2"], "clip_skip": 1}),
    ],
)
def test_nothing_is_read_back_in_a_step(family, settings, pictures, monkeypatch):
    steps, add = list[Reads](), BatchGradients.add

    def watched(self, inputs, *, last):
        with Reads() as reads:
            steps.append(reads)
            return add(self, inputs, last=last)

    def read(*_):
        raise AssertionError("a tensor is read back")

    monkeypatch.setattr(prompt_layout, "has_fixed_kernels", lambda _: True)
    monkeypatch.setattr(BatchGradients, "add", watched)
    for name in ("tolist", "numpy", "cpu"):
        method = getattr(torch.Tensor, name)
        guarded = lambda self, *args, method=method: method(self, *args) if not _inside(steps) else read()  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, guarded)
    next(fusion.train(tiny.pipeline(family), config(pictures, max_train_steps=1, num_validation_images=0, **settings)))
    assert [reads.names for reads in steps] == [[]] and steps[0].count > 500


def _inside(steps):
    return bool(torch.utils._python_dispatch._get_current_dispatch_mode()) and bool(steps)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("family", "clip_skip"), [("sd1", None), ("sd1", 1), ("sd2", None), ("sd2", 1), ("sdxl", None)]
)
def test_prompts_laid_out_before_are_those_that_pipelines_encode_and_recognise(family, clip_skip, fixed, monkeypatch):
    """Of any length, with and without the concept: bit for bit without it, within rounding where it acts."""
    monkeypatch.setattr(prompt_layout, "has_fixed_kernels", lambda _: fixed)
    pipe = tiny.pipeline(family)
    adapter = trained_adapter(pipe, "<dog>")
    side = pipe.unet.config.sample_size
    noisy, times = torch.randn(3, pipe.unet.config.in_channels, side, side), torch.tensor([3, 500, 900])
    prompts = ["a dog", f"{'dog ' * 40}<dog>", "a <dog> and a <dog>"]
    for attached in (True, False):
        with attach(pipe, adapter) if attached else nullcontext(), torch.no_grad():
            texts = prompts if attached else [prompt.replace("<dog>", "cat") for prompt in prompts]
            expected = encode_prompts(pipe, texts, clip_skip)
            predicted = predict(pipe, noisy, times, expected)
            batch = prompt_batch(pipe, texts)
            with prepared(pipe, batch):
                text = encode_batch(pipe, batch, clip_skip)
                prediction = predict(pipe, noisy, times, text)
        assert torch.equal(text.states[0], expected.states[0]) and text.states.shape == expected.states.shape
        assert torch.allclose(text.states, expected.states, atol=1e-5)
        assert torch.allclose(prediction, predicted, atol=1e-5)
        if text.pooled is not None:
            assert torch.allclose(text.pooled, expected.pooled, atol=1e-5)
        if not attached:
            assert torch.equal(prediction, predicted)
