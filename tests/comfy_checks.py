"""A toy of tests/comfy_toys.py in ComfyUI and in diffusers, compared call by call."""

import torch

import fusion
from trained import attached

CLOSE = 1e-5


def encode(comfyui, clip, text):
    with torch.inference_mode():
        return comfyui.CLIPTextEncode().encode(clip, text)[0]


def loaded(spectral, folders, toy, *adapters, strength=1.0):
    """MODEL and CLIP behind a loader for each adapter, from files."""
    model, clip = toy.model, toy.clip
    for adapter in adapters:
        name = f"{adapter.info.name}.safetensors"
        fusion.save(adapter, folders / name, dtype="float32", overwrite=True)
        model, clip = spectral["LoadSpectralAdapter"]().load(model, clip, name, strength, strength)
    return model, clip


def error(value, expected):
    return float((value - expected).norm() / expected.norm())


def check(toy, conds, references, calls, adapters):
    """Prompts and every call of ComfyUI's UNet are those of diffusers with the adapters attached.

    `references`: for each of the prompts the texts of its chunks.
    """
    with attached(toy.pipe, *adapters), torch.no_grad():
        prompts = []
        for cond, texts in zip(conds, references, strict=True):
            theirs = torch.cat([toy.encoded(text) for text in texts], dim=1)
            assert error(cond[0][0], theirs) < CLOSE, texts
            prompts.append((cond[0][0], theirs))
        check_calls(toy, calls, prompts)


def check_calls(toy, calls, prompts):
    """`prompts`: ComfyUI's tensor of each with diffusers'; ComfyUI repeats the shorter ones."""
    assert calls
    for x, t, context, y, control, out in calls:
        rows = []
        for row in context:
            fitting = [(a, b) for a, b in prompts if len(row) % a.shape[1] == 0]
            matches = [
                b[0].repeat(times, 1) for a, b in fitting
                if torch.equal(a[0].repeat(times := len(row) // a.shape[1], 1), row)
            ]  # fmt: skip
            rows.append(matches[0])
        with torch.no_grad():
            expected = toy.noise_prediction(x.clone(), t.clone(), torch.stack(rows), y, control)
        assert error(out, expected) < CLOSE
