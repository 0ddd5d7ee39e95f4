"""Too little memory is one line that names the settings that would take less."""

import pytest
import torch
from toy_training import config

import fusion
import tiny
from fusion.errors import OutOfMemory
from fusion.training import step as training_step

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "train_batch_size": 1}])
def test_the_line_names_what_is_not_set_already(settings, pictures, monkeypatch):
    training = fusion.train(tiny.pipeline("sd1"), config(pictures, checkpointing_steps=2, **settings))
    next(training)
    monkeypatch.setattr(training_step, "denoising_loss", lambda *_, **__: torch.empty(10**13).sum())
    with pytest.raises(OutOfMemory, match=r"not suffice for another 40000 GB; what helps: ") as caught:
        next(training)
    assert ("gradient_checkpointing" in str(caught.value)) == (not settings)
    assert ("train_batch_size below 2" in str(caught.value)) == (not settings)
    assert str(caught.value).endswith("mixed_precision = 'bf16' or 'fp16', a resolution below 16.")
    assert list((pictures.parent / "out/checkpoints/dog").glob("*/checkpoint-1"))  # the steps so far are kept


def test_other_errors_stay_as_they_are(pictures, monkeypatch):
    training = fusion.train(tiny.pipeline("sd1"), config(pictures))
    next(training)
    monkeypatch.setattr(training_step, "denoising_loss", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        next(training)
