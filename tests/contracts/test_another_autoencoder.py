"""A base with an autoencoder of factor 16 and 8 channels does all that others do."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from toy_training import config

import fusion
import tiny
from fusion.cli import main
from fusion.cli.check import native_resolution
from fusion.errors import ConfigError
from fusion.generation.config import Region
from trained import trained_adapter

SIDE, MULTIPLE = 64, 32  # the UNet halves its latents once
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a toy base: 64 px, latents of 8 × 4 × 4."""
    torch.manual_seed(0)
    small = tiny.pipeline("sd1")
    sizes = {"sample_size": 4, "in_channels": 8, "out_channels": 8}
    config = {key: value for key, value in small.unet.config.items() if not key.startswith("_")}
    levels = 5
    vae = AutoencoderKL(
        **{"sample_size": SIDE, "block_out_channels": (8,) * levels, "latent_channels": 8, "norm_num_groups": 4},
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    parts = {**small.components, "vae": vae, "unet": UNet2DConditionModel.from_config({**config, **sizes})}
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(base):
    return fusion.open_pipeline(base, device="cpu")


def drawing(**settings):
    return fusion.GenerationConfig(**{"prompt": "a <rex> beside a dog", "num_inference_steps": 2, **settings})


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(2):
        Image.fromarray(noise(k)).save(folder / f"{k}.png")
    return folder


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_it_is_trained_fused_drawn_and_evaluated(pipe, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))
    steps = list(fusion.train(pipe, config(pictures, token="<rex>", max_train_steps=2, quiet_loss_weight=1.0)))
    assert len(steps) == 2 and torch.tensor(steps[-1].loss).isfinite()
    adapters = [steps[-1].adapter, trained_adapter(pipe, "<tom>", k=1)]
    report = fusion.evaluate(pipe, adapters, prompts=["a {token}"], concept_free=["a dog"])
    assert report.gated.output_error == {"<rex>": 0.0, "<tom>": 0.0} and report.gated.drift == 0.0
    both = fusion.fuse(adapters)
    for extra in ({}, {"image": Image.new("RGB", (70, 50), (200, 60, 60))}):
        pictured = [fusion.generate(pipe, drawing(width=SIDE, height=SIDE), [one], **extra)[0] for one in adapters[:1]]
        fused = fusion.generate(pipe, drawing(width=SIDE, height=SIDE), [both], **extra)[0]
        assert pictured[0].image.size == fused.image.size == (SIDE, SIDE)
        assert pictured[0].image.tobytes() == fused.image.tobytes()  # the prompt names <rex> alone


@pytest.mark.slow
def test_regions_and_masks_are_cut_at_its_scale(pipe):
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    regions = (Region("<rex>", LEFT), Region("<tom>", RIGHT))
    picture = fusion.generate(pipe, drawing(prompt="a <rex> and a <tom>", regions=regions), adapters)[0]
    plain = fusion.generate(pipe, drawing(prompt="a <rex> and a <tom>"), adapters)[0]
    assert picture.image.size == (SIDE, SIDE) and picture.image.tobytes() != plain.image.tobytes()
    start, config, differences = Image.fromarray(noise()), pipe.unet.config, []
    for box in ((48, 48, 64, 64), (0, 0, 64, 64)):
        mask = Image.new("L", (SIDE, SIDE))
        mask.paste(255, box)
        two = [fusion.generate(pipe, drawing(prompt=p), adapters[:1], image=start, mask=mask) for p in ("a <rex>", "")]
        one, other = (np.asarray(pictures[0].image, int)[:32, :32] for pictures in two)
        differences.append(np.abs(one - other).mean())
    assert 3 * differences[0] < differences[1]  # the prompt matters less where the mask leaves the picture as it is
    assert pipe.unet.config == config


@pytest.mark.parametrize("extra", [{}, {"image": Image.new("RGB", (70, 50))}], ids=["prompt", "image"])
def test_a_size_that_does_not_suit_it_is_refused_with_the_multiple(pipe, extra):
    size = {} if extra else {"width": 48}
    with pytest.raises(ConfigError, match=rf"^width \d+ does not suit this base; use a multiple of {MULTIPLE}\.$"):
        fusion.generate(pipe, drawing(**size), **extra)


def test_check_reads_its_sizes_from_its_folder(base, pictures, capsys):
    words = ["check", str(pictures), "--token", "<rex>", "--base", str(base)]
    assert native_resolution(base) == (SIDE, 16) and main(words) == 0
    assert main([*words, "--resolution", "40"]) == 1
    assert "use a multiple of 16" in capsys.readouterr().err
