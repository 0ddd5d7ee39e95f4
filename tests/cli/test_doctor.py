"""`fusion doctor` tries a base on this machine, and finds what is wrong with one."""

import re

import single_files
import torch

import tiny
from fusion.cli import main


def test_a_base_in_one_file_is_tried_and_reported(tmp_path, capsys):
    pipe = tiny.pipeline("sdxl")
    pipe.save_pretrained(tmp_path / "configs")
    single_files.save(pipe, tmp_path / "noob.safetensors", "v_pred", "ztsnr")
    base = ["--base", str(tmp_path / "noob.safetensors"), "--base_config", str(tmp_path / "configs")]
    assert main(["doctor", *base, "--max_train_steps", "3", "--device", "cpu"]) == 0
    report = capsys.readouterr().out
    lines = dict(line.split("  ", 1) for line in report.splitlines())
    shown = {name.strip(): text.strip() for name, text in lines.items()}
    assert shown["base"].startswith("noob: sdxl, ") and "digest " in shown["base"]
    assert shown["predicts"] == "v_prediction; zero terminal SNR, EulerDiscreteScheduler, timesteps trailing"
    assert shown["a prompt without concepts: same bits"] == shown["one concept of two: same bits"] == "yes"
    assert shown["training is finite"].startswith("yes, 3 steps of 16 px, ") and shown["result"] == "all checks passed"
    assert str(tmp_path) not in report  # it is to be shown to others


def test_a_base_that_draws_nothing_fails(tmp_path, capsys):
    pipe = tiny.pipeline("sd1")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.zero_()
    pipe.save_pretrained(tmp_path / "base")
    words = ["doctor", "--base", str(tmp_path / "base"), "--max_train_steps", "2", "--device", "cpu"]
    assert main(words) == 1
    report = capsys.readouterr().out
    assert re.search(r"the picture has content +NO, standard deviation 0.0 of 255\n", report)
    assert report.endswith("checks failed: 2\n")  # nor can a concept be seen
    assert main([*words, "--resolution", "9"]) == 2
