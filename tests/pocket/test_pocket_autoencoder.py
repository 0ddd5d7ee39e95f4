"""The autoencoder of pocket's training: how it starts from an older one, and what finishing does."""

import random

import numpy as np
import pytest
import torch

from tools.pocket import autoencoder
from tools.pocket.painting import Painter
from tools.pocket.scenes import compose
from tools.pocket.settings import Settings

TODAY = Settings()


@pytest.mark.parametrize(("older", "newer"), [(Settings(64, 4), TODAY), (TODAY, TODAY), (TODAY, Settings(256, 16, 8))])
def test_the_inner_levels_of_an_older_one_are_taken_over(older, newer):
    model, start = autoencoder.fresh(newer), autoencoder.fresh(older)
    autoencoder.start_from(model, start)
    shift = autoencoder.missing_levels(model, start)
    assert shift == len(newer.widths) - len(older.widths)
    for name in ("decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_norm_out.weight"):
        assert torch.equal(common(model.state_dict()[name], start.state_dict()[name]), start.state_dict()[name])
    ours, theirs = model.encoder.down_blocks[1 + shift], start.encoder.down_blocks[1]
    inner = theirs.resnets[0].conv1.weight
    assert torch.equal(common(ours.resnets[0].conv1.weight, inner), inner)
    x = torch.randn(1, start.config.block_out_channels[-1], 4, 4)
    means = [m.quant_conv(m.encoder.conv_out(x))[:, : older.channels] for m in (model, start)]
    assert torch.allclose(*means, atol=1e-5)  # the first channels of the code are the older one's
    z = torch.randn(1, older.channels, 4, 4)
    wide = torch.cat([z, torch.randn(1, newer.channels - older.channels, 4, 4)], 1)
    ours, theirs = (m.decoder.conv_in(m.post_quant_conv(c)) for m, c in ((model, wide), (start, z)))
    assert torch.allclose(ours, theirs, atol=1e-5)  # and are decoded so, whatever the new ones hold


def common(wide, narrow):
    """The part of a weight that a narrower one has, too."""
    return wide[tuple(slice(n) for n in narrow.shape)]


def test_a_start_of_the_same_shape_gives_the_same_pictures():
    model, start = autoencoder.fresh(TODAY), autoencoder.fresh(TODAY)
    autoencoder.start_from(model, start)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(autoencoder.reconstruct(model, x), autoencoder.reconstruct(start, x))


@pytest.mark.parametrize("common", [0, 4, 8])
def test_a_finished_one_encodes_to_a_point_of_variance_one_and_decodes_as_before(common):
    model = autoencoder.fresh(Settings(64, 16, 8))
    x, scale = torch.rand(4, 3, 64, 64) * 2 - 1, 0.8
    with torch.no_grad():
        old, y = autoencoder.encode(model, x), autoencoder.reconstruct(model, x)
        autoencoder.finish(model, x, common, scale)
        posterior = model.encode(x).latent_dist
        z = posterior.mean * scale
    assert posterior.std.max() < 1e-6
    assert torch.allclose(posterior.mean[:, :common], old[:, :common], atol=1e-5)
    for new in z[:, common:].unbind(1):
        assert abs(new.mean()) < 1e-3 and abs(new.std(correction=0) - 1) < 1e-3
    assert torch.allclose(autoencoder.reconstruct(model, x), y, atol=1e-4)


def test_retold_scenes_are_a_share_of_them_and_always_the_same_ones():
    sprites = np.full((2, 128, 128, 4), 255, np.uint8)
    model = autoencoder.fresh(Settings(64, 16, 8))
    plain, decoded = Painter(sprites, 64), autoencoder.DecodingPainter(sprites, model, share=0.4)
    rng = random.Random(0)
    scenes = [compose(rng, None, "alone", sprites=[k % 2]) for k in range(30)]
    x, y = plain.arrays(scenes), decoded.arrays(scenes)
    assert 6 <= (x != y).any((1, 2, 3)).sum() <= 18
    assert (np.abs(decoded.arrays(scenes[:5]).astype(int) - y[:5]) <= 1).all()


def test_crops_are_parts_of_scenes_and_augmented_by_their_step():
    from tools.pocket.artwork import Sprite
    from tools.pocket.scenes import Palette
    from tools.pocket.training import Draws

    sprites = np.random.default_rng(0).integers(0, 255, (2, 128, 128, 4), dtype=np.uint8)
    palette = Palette([Sprite("noto", "fox", "fox")] * 2, ["fox"], ["noto"], emphasis={})
    one, two = (autoencoder.pictures(Painter(sprites, 128), palette, random.Random(1), 6, 48) for _ in range(2))
    assert one.shape == (6, 3, 48, 48) and torch.equal(one, two)
    x = torch.cat([autoencoder.augment(one, Draws(0, 5)) for _ in range(1)])
    assert torch.equal(x, autoencoder.augment(one, Draws(0, 5)))
    assert torch.allclose(x.sum((1, 2, 3)), one.sum((1, 2, 3)), atol=1e-2)  # the same pixels and colours elsewhere
