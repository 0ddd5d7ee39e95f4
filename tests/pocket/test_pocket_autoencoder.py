"""The autoencoder of pocket's training: how it starts from an older one, and what finishing does."""

import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tools.pocket import autoencoder
from tools.pocket.scenes import Painter, compose


def older(channels):
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


@pytest.mark.parametrize("channels", [(32, 48, 96), autoencoder.CHANNELS])
def test_the_inner_levels_of_an_older_one_are_taken_over(channels):
    model, start = autoencoder.fresh(), older(channels)
    autoencoder.start_from(model, start)
    shift = autoencoder.missing_levels(start)
    assert shift == 4 - len(channels)
    for name in ("decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight", "quant_conv.bias"):
        assert torch.equal(common(model.state_dict()[name], start.state_dict()[name]), start.state_dict()[name])
    ours, theirs = model.encoder.down_blocks[1 + shift], start.encoder.down_blocks[1]
    inner = theirs.resnets[0].conv1.weight
    assert torch.equal(common(ours.resnets[0].conv1.weight, inner), inner)


def common(wide, narrow):
    """The part of a weight that a narrower one has, too."""
    return wide[tuple(slice(n) for n in narrow.shape)]


def test_a_start_of_the_same_shape_gives_the_same_pictures():
    model, start = autoencoder.fresh(), autoencoder.fresh()
    autoencoder.start_from(model, start)
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(autoencoder.reconstruct(model, x), autoencoder.reconstruct(start, x))


def test_a_finished_one_encodes_to_a_point():
    model = autoencoder.fresh()
    autoencoder.finish(model)
    with torch.no_grad():
        posterior = model.encode(torch.zeros(1, 3, 128, 128)).latent_dist
    assert posterior.mean.shape == (1, 4, 16, 16)
    assert posterior.std.max() < 1e-6


def test_retold_scenes_are_a_share_of_them_and_always_the_same_ones():
    sprites = np.full((2, 128, 128, 4), 255, np.uint8)
    plain, decoded = Painter(sprites), autoencoder.DecodingPainter(sprites, autoencoder.fresh(), share=0.4)
    rng = random.Random(0)
    scenes = [compose(rng, None, "alone", sprites=[k % 2]) for k in range(30)]
    changed = [not np.array_equal(plain.array(scene), decoded.array(scene)) for scene in scenes]
    assert 6 <= sum(changed) <= 18
    assert all(np.array_equal(decoded.array(scene), decoded.array(scene)) for scene in scenes[:5])
