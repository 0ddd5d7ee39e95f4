"""An exported LoRA with its embeddings gives the same keys and values of cross-attention in other programs' hands.

diffusers runs here. ComfyUI runs where COMFYUI_DIR names a checkout of it and, after a colon, folders of packages that
it needs and that are not installed.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fusion
import tiny
from fusion.formats.lora_export import export
from fusion.models.attachment import attach
from fusion.models.denoising import encode_prompts

TOLERANCE = 1e-3  # of the keys and values, relative: files hold float16
TARGETS = ["text_encoder", "text_encoder.mlp", "unet.attn2.to_k", "unet.attn2.to_v"]  # those of a distillation
PROMPTS = ("{rex} on a {tom}", "a dog beside {tom} in the snow", "a dog and a cat", "")


@torch.no_grad()
def keys_and_values(pipe, prompts):
    """(prompts, T, O) of every layer of cross-attention."""
    states = encode_prompts(pipe, list(prompts))[0]
    ends = ("attn2.to_k", "attn2.to_v")
    return {name: layer(states) for name, layer in pipe.unet.named_modules() if name.endswith(ends)}


def difference(theirs, ours):
    assert theirs.keys() == ours.keys()
    return max(float((theirs[name] - ours[name]).norm() / ours[name].norm()) for name in ours)


def distilled(pipe, trained):
    """Two gated concepts in one plain LoRA."""
    gated = [trained(pipe, vectors=3), trained(pipe, "lora", token="<tom>", noun="cat", vectors=3)]
    config = fusion.DistillationConfig(
        rank=8, max_train_steps=10, train_batch_size=8, decoys=2, checkpointing_steps=0, learning_rate=3e-3
    )
    *_, last = fusion.distill(pipe, gated, config)
    return last.adapter


def plain(pipe, trained, side_by_side):
    """What a distillation of two concepts looks like, with random values."""
    options = {"targets": TARGETS, "vectors": 3, "gated": False, "scale": 0.05}
    rex, tom = trained(pipe, "lora", **options), trained(pipe, "lora", token="<tom>", noun="cat", **options)
    both = side_by_side(rex, tom)
    for rows in both.tokens.values():
        rows["text_encoder"] += 0.02 * torch.randn_like(rows["text_encoder"])
    return both


@pytest.fixture(params=["sd1", "pocket"])
def exported(request, trained, side_by_side, tmp_path):
    """A pipeline, its keys and values with two concepts in a plain LoRA, and that LoRA exported."""
    if request.param == "pocket":
        pipe = fusion.open_pipeline(device="cpu")
        both = plain(pipe, trained, side_by_side)
    else:
        pipe = tiny.pipeline("sd1")
        both = distilled(pipe, trained)
    with attach(pipe, replace(both, branches=())):
        before = keys_and_values(pipe, ["<rex> on a <tom>"])
    with attach(pipe, both):
        ours = keys_and_values(pipe, [prompt.format(rex="<rex>", tom="<tom>") for prompt in PROMPTS])
        assert difference(keys_and_values(pipe, ["<rex> on a <tom>"]), before) > 0.05, "the LoRA should be seen"
    return pipe, ours, export(both, tmp_path / "lora.safetensors", "kohya")


def test_diffusers_reads_the_same_keys_and_values(exported):
    pipe, ours, report = exported
    pipe.load_lora_weights(str(report.path))
    for file in report.files[1:]:
        pipe.load_textual_inversion(str(file))
    theirs = keys_and_values(pipe, [prompt.format(rex="<rex>", tom="<tom>") for prompt in PROMPTS])
    assert difference(theirs, ours) < TOLERANCE


def test_comfyui_reads_the_same_keys_and_values(exported, tmp_path):
    checkout = os.environ.get("COMFYUI_DIR")
    if not checkout:
        pytest.skip("COMFYUI_DIR names no checkout of ComfyUI")
    pipe, ours, report = exported
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "embeddings").mkdir()
    for file in report.files[1:]:
        file.rename(tmp_path / "embeddings" / file.name)
    words = {"rex": "embedding:lora_rex", "tom": "embedding:lora_tom"}
    (tmp_path / "prompts.json").write_text(json.dumps([prompt.format(**words) for prompt in PROMPTS]))
    script = Path(__file__).with_name("read_by_comfyui.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=checkout.split(os.pathsep)[0],
        env=os.environ | {"PYTHONPATH": checkout},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "read.safetensors", "pt") as file:
        assert file.metadata() == {"not read": "[]"}
    rows = load_file(tmp_path / "read.safetensors")
    theirs = {name: torch.cat([rows[f"{k}:{name}"] for k in range(len(PROMPTS))]) for name in ours}
    assert difference(theirs, ours) < TOLERANCE
