"""Laws of aspect-ratio buckets: kohya's sizes, batches of one size, every picture in its turn, SDXL told the truth."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_training import config, run, same

import tiny
from fusion.cli import main
from fusion.errors import ConfigError
from fusion.training.buckets import bucket_sizes, nearest_size, training_sizes
from fusion.training.dataset import BatchOrder, instance_dataset, prepare
from fusion.training.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("shared_cache")
BUCKETED = {"enable_bucket": True, "resolution": 16, "bucket_reso_steps": 2, "num_validation_images": 0}
EXAMPLES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=7)


@pytest.fixture
def mixed(tmp_path):
    """Two square pictures, a wide one, two high ones and a mask."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, size in {"a": (40, 40), "b": (44, 44), "c": (80, 40), "d": (40, 70), "e": (50, 90)}.items():
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.linear_gradient("L").resize((40, 70)).save(folder / "d.mask.png")
    return folder


def test_sizes_are_those_of_kohyas_scripts():
    # What library/model_util.py of kohya-ss/sd-scripts makes of (512, 512), 256, 1024, 64.
    assert bucket_sizes(512, 256, 1024, 64) == [
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
        (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
    ]  # fmt: skip
    assert nearest_size((832, 1216), bucket_sizes(1024, 512, 2048, 64)) == (832, 1216)
    assert nearest_size((3000, 2000), bucket_sizes(512, 256, 1024, 64)) == (640, 384)


@given(EXAMPLES, st.integers(1, 5), st.integers(0, 99))
def test_batches_are_of_one_bucket_and_every_picture_has_its_turns(examples, batch_size, seed):
    repeats, buckets = (tuple(column) for column in zip(*examples, strict=True))
    order = BatchOrder(repeats, batch_size, seed, buckets)
    batches = [order.batch(number) for number in range(sum(repeats))]
    assert all(len(batch) == batch_size and len({buckets[i] for i in batch}) == 1 for batch in batches)
    uses = Counter(index for batch in batches for index in batch)
    assert uses == Counter({index: count * batch_size for index, count in enumerate(repeats)})
    if len(set(buckets)) == 1:
        assert batches == [BatchOrder(repeats, batch_size, seed).batch(number) for number in range(sum(repeats))]


@pytest.mark.parametrize("extra", [{}, {"center_crop": False, "random_flip": True}])
def test_a_batch_has_one_size_and_the_conditioning_that_sdxl_was_trained_with(extra, mixed):
    data = TrainingData(tiny.pipeline("sdxl"), settings := config(mixed, **BUCKETED, **extra))
    data.prepare()
    sizes = set[tuple[int, int]]()
    for number in range(5):
        batch = data.batch(number, torch.Generator().manual_seed(number))
        height, width = (side * 2 for side in batch.latents.shape[-2:])
        sizes.add((width, height))
        order = data.instances.order(2, settings.seed, data.sizes).batch(number)
        for index, mask, ids in zip(order, batch.mask, batch.time_ids, strict=True):
            example = data.instances.examples[index]
            assert ids[:2] == example.size[::-1] and ids[4:] == (height, width)
            assert nearest_size(example.size, data.sizes) == (width, height)
            scale = max(width / example.size[0], height / example.size[1])
            spare = [round(side * scale) - target for side, target in zip(example.size, (width, height), strict=True)]
            assert 0 <= ids[2] <= spare[1] and 0 <= ids[3] <= spare[0] and min(spare) == 0
            assert (mask.min() < 1) == (example.mask_path is not None)
    assert sizes == {(16, 16), (22, 10), (12, 20)}


def test_a_picture_is_scaled_until_it_just_covers_its_bucket_and_cropped_in_the_middle(mixed):
    wide = next(e for e in instance_dataset(config(mixed)).examples if e.image_path.name == "c.png")
    part = prepare(wide, (22, 10), config(mixed))  # 80x40 becomes 22x11
    assert part.pixels.shape == (3, 10, 22) and part.original_size == (40, 80) and part.crop_top_left == (0, 0)
    with Image.open(wide.image_path) as whole:
        mean = np.asarray(whole.resize((22, 11), Image.Resampling.LANCZOS)).mean() / 127.5 - 1
    assert (part.pixels[:, 1:-1] - prepare(wide, (22, 11), config(mixed)).pixels[:, 1:-2]).abs().max() < 0.5
    assert abs(prepare(wide, (22, 11), config(mixed)).pixels.mean() - mean) < 1e-2
    assert prepare(wide, (8, 16), config(mixed)).crop_top_left == (0, 12)  # of 32x16


@pytest.mark.parametrize(("family", "prior"), [("sd1", True), ("sdxl", False)])
def test_trainings_on_buckets_and_shuffled_tags_resume_exactly(family, prior, mixed, tmp_path):
    classes = tmp_path / "classes"
    classes.mkdir()
    for name in ("c", "d"):
        (classes / f"{name}.png").write_bytes((mixed / f"{name}.png").read_bytes())
    others = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": classes, "gating": "none"}
    varying = {"shuffle_caption": True, "caption_dropout_rate": 0.4, "instance_prompt": "{token}, dog, snow"}
    others = others | {"num_class_images": 2, "text_encoder_lr": 0.0, "token_lr": 0.0} if prior else varying
    settings, pipe = config(mixed, **BUCKETED, checkpointing_steps=2, **others), tiny.pipeline(family)
    steps, whole = run(pipe, settings)
    again, resumed = run(pipe, settings.updated({"resume_from_checkpoint": "checkpoint-2"}))
    assert again[-1].loss == steps[-1].loss and same(whole, resumed)


def test_pictures_of_one_shape_train_as_without_buckets(pictures):
    for i in range(3):
        with Image.open(pictures / f"{i}.png") as picture:
            square = picture.crop((0, 0, 40, 40))
        square.save(pictures / f"{i}.png")
    pipe = tiny.pipeline("sdxl")
    plain = run(pipe, config(pictures, resolution=16, num_validation_images=0))[1]
    assert same(plain, run(pipe, config(pictures, **BUCKETED))[1])


def test_sizes_that_do_not_suit_are_refused(mixed):
    for settings, message in {
        ("bucket_reso_steps", 12): "bucket_reso_steps 12 does not suit this base; use a multiple of 8",
        ("min_bucket_reso", 640): "buckets of 640 to 1024 px do not suit resolution 512",
        ("max_bucket_reso", 256): "buckets of 256 to 256 px do not suit resolution 512",
    }.items():
        with pytest.raises(ConfigError, match=message):
            training_sizes(config(mixed, enable_bucket=True, **dict([settings])), 512, 8)
    assert (64, 64) in training_sizes(config(mixed, enable_bucket=True), 64, 8)


def test_check_shows_the_buckets_and_their_first_batches(mixed, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    flags = ["--resolution", "64", "--enable_bucket", "--train_batch_size", "2", "-o", str(sheet)]
    assert main(["check", str(mixed), *flags]) == 0
    printed = capsys.readouterr().out
    assert "buckets: 48x80 2 pictures, 64x64 2 pictures, 88x40 1 picture" in printed
    assert printed.count("\nbatch ") == 3
    with Image.open(sheet) as page:
        assert page.width > 4 * 88
