"""Families are recognised by structure."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import tiny
from fusion.adapters.adapter import BaseInfo
from fusion.errors import BaseMismatch
from fusion.models.pipelines import base_info
from fusion.models.pipelines import family as family_of


def test_each_pipeline_is_of_its_family(pipe, family):
    assert family_of(pipe) == family
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    assert base_info(pipe) == BaseInfo(family, "unnamed", prediction)


def test_the_scheduler_says_what_is_predicted_and_the_folder_the_name(tmp_path):
    pipe = tiny.pipeline("sd1")
    pipe.save_pretrained(tmp_path / "my-base", safe_serialization=True)
    again = type(pipe).from_pretrained(tmp_path / "my-base", local_files_only=True)
    again.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert base_info(again) == BaseInfo("sd1", "my-base", "v_prediction")


def test_other_pipelines_are_refused_by_name():
    class Nothing:
        unet = nn.Linear(2, 2)

    with pytest.raises(BaseMismatch, match=r"Nothing has no UNet with a CLIP text encoder; .*1\.x, 2\.x and XL"):
        family_of(Nothing())
    assert torch.is_tensor(Nothing.unet.weight)
