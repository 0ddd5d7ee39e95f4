"""All stages in order, a step or two each, from sprites of one colour to the folders that are shipped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import fusion
from tools.pocket import __main__ as program
from tools.pocket import artwork, denoiser, latents, subjects
from tools.pocket.artwork import Sprite

ASSETS = Path(__file__).parents[2] / "assets"
SIZES = ["--side", "64", "--factor", "16", "--channels", "8", "--vocabulary", "all"]
EVERY = 60


def sprites():
    index = [Sprite(s, name, name.replace("-", " ")) for s in ("noto", "glossy", "outline") for name in artwork.WANTED]
    shapes = np.zeros((len(index), 64, 64, 4), np.uint8)
    for k, shape in enumerate(shapes):
        shape[4:-4, 4 + k % 20 : -4] = (k % 256, 7 * k % 256, 200, 255)
    return shapes, index


@pytest.mark.long
def test_every_stage_runs_at_another_size_from_todays_weights(tmp_path, monkeypatch):
    (tmp_path / "artwork").mkdir()
    artwork.pack(tmp_path / "artwork" / "sprites.npz", *sprites())
    monkeypatch.setattr(latents, "SHARD", 60)
    start = ["--start", str(ASSETS / "pocket")]

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pocket", "--work", str(tmp_path), *words])
        program.main()

    run(*SIZES, "artwork")
    run("tokenizer", *start)
    run("autoencoder", *start, "--steps", "2", "--batch", "2", "--crop", "32", "--whole", "0.5")
    run("latents", "--count", "100", "--workers", "2")
    run("denoiser", *start, "--steps", "1", "--batch", "4")
    run("denoiser", *start, "--steps", "2", "--batch", "4")
    run("denoiser", *start, "--minutes", "0.0001", "--batch", "4")  # over already: writes the weights
    run("judge", "--start", str(ASSETS / "pocket-clip"), "--steps", "1", "--batch", "6")
    run("classifier", "--steps", "1", "--batch", "6")
    run("evaluate", "--every", str(EVERY), "--pictures", "8", "--older", str(ASSETS / "pocket"))
    run("card", "--no-sheet")

    z, ids = latents.load(tmp_path)
    assert z.shape == (120, 8, 4, 4) and ids.shape == (120, 64)
    assert torch.load(tmp_path / "denoiser" / "checkpoint.pt", weights_only=True)["step"] == 2
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert {*results["autoencoder"]} >= {"trained", "trained_older", "outline"}
    assert results["pocket"]["alone"]["pictures"] == len([*subjects.TRAINED, *subjects.OTHERS][::EVERY])
    folder = tmp_path / "assets" / "pocket"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "64 × 64 px" in card and "(336;" in card and "latents 4 × 4 × 8" in card and "<!--" not in card
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert weights.get_tensor("conv_in.weight").shape == (denoiser.CHANNELS[0], 8, 3, 3)
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    pipe = fusion.open_pipeline(folder, device="cpu")
    picture = fusion.generate(pipe, fusion.GenerationConfig(prompt="two sparkles", num_inference_steps=1))[0].image
    assert isinstance(picture, Image.Image) and picture.size == (64, 64)
