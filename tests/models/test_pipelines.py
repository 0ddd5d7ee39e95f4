"""Families are recognised by structure."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import tiny
from fusion.adapters.adapter import BaseInfo
from fusion.base_models.opening import open_pipeline
from fusion.errors import BaseMismatch, ConfigError
from fusion.evaluation.clip_judge import open_judge
from fusion.models.pipelines import base_info
from fusion.models.pipelines import family as family_of


def test_each_pipeline_is_of_its_family(pipe, family):
    assert family_of(pipe) == family
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    digest = base_info(pipe).digest
    assert base_info(pipe) == BaseInfo(family, "unnamed", prediction, digest) and len(digest) == 16


def test_the_scheduler_says_what_is_predicted_and_the_folder_the_name(tmp_path):
    pipe = tiny.pipeline("sd1")
    pipe.save_pretrained(tmp_path / "my-base", safe_serialization=True)
    again = type(pipe).from_pretrained(tmp_path / "my-base", local_files_only=True)
    again.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert base_info(again) == BaseInfo("sd1", "my-base", "v_prediction", base_info(pipe).digest)


def test_other_pipelines_are_refused_by_name():
    class Nothing:
        unet = nn.Linear(2, 2)

    with pytest.raises(BaseMismatch, match=r"Nothing has no UNet with a CLIP text encoder; .*1\.x, 2\.x and XL"):
        family_of(Nothing())
    assert torch.is_tensor(Nothing.unet.weight)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", "x" * 1000])
def test_a_device_that_is_not_here_is_refused_before_anything_is_opened(device, tmp_path):
    for opener in (open_pipeline, open_judge):
        with pytest.raises(ConfigError, match=rf"^There is no device '{device[:100]}' here; there is cpu"):
            opener(tmp_path, device=device)


@pytest.mark.parametrize("base", ["x" * 5000, "~nobody/x", "a\0b"])
def test_a_base_of_an_impossible_name_is_refused(base):
    with pytest.raises(BaseMismatch, match="could not be opened"):
        open_pipeline(base, device="cpu")
