"""Laws of reading one picture: whatever the file's kind it comes out upright and plain, or is refused by name."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import tiny
from fusion.cli.evaluate import load_references
from fusion.cli.generate import picture_to_start_from, region
from fusion.errors import DatasetError
from fusion.evaluation.clip_judge import open_judge
from fusion.evaluation.sheets import contact_sheet
from fusion.formats.picture_file import MAX_PIXELS, as_mask, as_picture, is_transparent, load_mask, load_picture
from fusion.generation.config import GenerationConfig, Region
from fusion.generation.drawing import generate
from fusion.training.config import TrainingConfig
from fusion.training.dataset import Example, instance_dataset, prepare
from fusion.training.picture_checks import check_pictures
from fusion.training.pictures import cut


def gradient(width=48, height=40) -> Image.Image:
    """Bright on the right, green below: every edge can be told from the others."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x + 90], axis=-1).astype(np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header_only_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def refusal(path) -> str:
    with pytest.raises(DatasetError) as caught:
        load_picture(path)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp", "PNG", "JPG"])
def test_a_plain_picture_comes_as_it_is(tmp_path, ending):
    path = tmp_path / f"döggie 犬.{ending}"
    options = {"lossless": True} if ending == "webp" else {"quality": 95}
    gradient().save(path, **options)
    loaded = load_picture(path)
    assert loaded.mode == "RGB"
    assert loaded.size == (48, 40)
    assert abs(pixels(loaded) - pixels(gradient())).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(tmp_path, orientation):
    # How a camera held in each of the eight ways stores the same scene.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = gradient().transpose(undo[orientation]) if orientation > 1 else gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "dog.jpg", quality=95, exif=exif)
    loaded = load_picture(tmp_path / "dog.jpg")
    assert loaded.size == (48, 40)
    assert abs(pixels(loaded) - pixels(gradient())).mean() < 3


def test_transparent_parts_become_white_and_half_transparent_ones_half_white(tmp_path):
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    image.paste((200, 0, 0, 128), (20, 0, 40, 20))
    image.save(tmp_path / "dog.png")
    loaded = load_picture(tmp_path / "dog.png")
    assert loaded.getpixel((5, 5)) == (255, 255, 255)
    assert loaded.getpixel((5, 35)) == (200, 0, 0)
    half = loaded.getpixel((35, 5))
    assert abs(half[0] - 227) <= 1 and abs(half[1] - 127) <= 1


def test_opaque_alpha_is_not_called_transparent():
    assert not is_transparent(gradient().convert("RGBA"))
    assert not is_transparent(gradient())
    assert is_transparent(Image.new("RGBA", (40, 40), (0, 0, 0, 254)))


def test_palettes_with_and_without_transparency(tmp_path):
    plain = gradient().quantize(64)
    plain.save(tmp_path / "plain.png")
    assert abs(pixels(load_picture(tmp_path / "plain.png")) - pixels(gradient())).mean() < 20
    clear = Image.new("P", (40, 40), 0)
    clear.putpalette([10, 20, 30, 200, 100, 50])
    clear.paste(1, (0, 0, 20, 40))
    clear.save(tmp_path / "clear.png", transparency=1)
    loaded = load_picture(tmp_path / "clear.png")
    assert loaded.getpixel((5, 5)) == (255, 255, 255)
    assert loaded.getpixel((35, 5)) == (10, 20, 30)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    row = pixels(load_picture(tmp_path / "deep.png"))[0, :, 0]
    assert row[0] == 0 and row[-1] == 255 and abs(row[32] - 129) <= 2
    assert (np.diff(row) > 0).all()


@pytest.mark.parametrize(("mode", "ending"), [("CMYK", "jpg"), ("L", "jpg"), ("L", "png"), ("LA", "png"), ("1", "png")])
def test_other_modes_become_rgb(tmp_path, mode, ending):
    gradient().convert("L" if mode == "LA" else mode).convert(mode).save(tmp_path / f"dog.{ending}", quality=95)
    loaded = load_picture(tmp_path / f"dog.{ending}")
    assert loaded.mode == "RGB"
    reference = gradient().convert("L").convert("RGB") if mode != "CMYK" else gradient()
    assert abs(pixels(loaded).mean() - pixels(reference).mean()) < 8


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_truncated_picture_is_refused(tmp_path, ending):
    path = tmp_path / f"dog.{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cannot be read" in refusal(path) or "no PNG" in refusal(path)


def test_flipped_bits_never_escape_as_another_error(tmp_path):
    gradient().save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        (tmp_path / "bad.png").write_bytes(bad)
        try:
            load_picture(tmp_path / "bad.png")
        except DatasetError as error:
            assert "bad.png" in str(error)


@pytest.mark.parametrize("content", [b"", b"this is no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_only_looks_like_a_picture_is_refused(tmp_path, content):
    path = tmp_path / "dog.png"
    path.write_bytes(content)
    refusal(path)


def test_other_kinds_of_picture_are_refused_whatever_their_name(tmp_path):
    gradient().save(tmp_path / "dog.png", format="GIF")
    assert "no PNG, JPEG or WebP" in refusal(tmp_path / "dog.png")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 10_000), (8001, 8000)])
def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, width, height, monkeypatch):
    path = tmp_path / "dog.png"
    path.write_bytes(header_only_png(width, height))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    assert "more than 64 megapixels" in refusal(path)
    assert width * height > MAX_PIXELS


@pytest.mark.parametrize("size", [(4, 4), (400, 31), (1, 400)])
def test_a_tiny_picture_is_refused_with_its_size(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "dog.png")
    assert f"{size[0]}x{size[1]}" in refusal(tmp_path / "dog.png")


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_an_animation_is_refused(tmp_path, ending):
    path = tmp_path / f"dog.{ending}"
    gradient().save(path, save_all=True, append_images=[gradient().transpose(Image.Transpose.ROTATE_180)])
    assert "animation of 2 frames" in refusal(path)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    refusal(tmp_path / "folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    refusal(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert "No such file" in refusal(tmp_path / "link.png")


def test_a_mask_is_white_where_the_concept_is_and_transparency_is_none_of_it(tmp_path):
    mask = Image.new("RGBA", (48, 40), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 24, 40))
    mask.save(tmp_path / "mask.png")
    loaded = load_mask(tmp_path / "mask.png", (48, 40))
    assert loaded.mode == "L"
    assert loaded.getpixel((5, 5)) == 255
    assert loaded.getpixel((40, 5)) == 0


def test_a_mask_of_another_size_or_all_black_is_refused(tmp_path):
    Image.new("L", (48, 40), 255).save(tmp_path / "mask.png")
    with pytest.raises(DatasetError, match="48x40, its picture 40x48"):
        load_mask(tmp_path / "mask.png", (40, 48))
    Image.new("L", (48, 40)).save(tmp_path / "mask.png")
    with pytest.raises(DatasetError, match="all black"):
        load_mask(tmp_path / "mask.png", (48, 40))


def test_a_mask_of_zeros_and_ones_is_black_and_white_and_one_too_dark_to_show_anything_is_refused(tmp_path):
    values = np.zeros((40, 48), np.uint8)
    values[:, 24:] = 1
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert (np.asarray(load_mask(tmp_path / "mask.png")) == 255 * values).all()
    Image.fromarray(values * 20).save(tmp_path / "mask.png")
    with pytest.raises(DatasetError, match=r"mask\.png has no value above 20 of 255"):
        load_mask(tmp_path / "mask.png")


def profile_of_swapped_colours() -> bytes:
    """sRGB whose red and blue primaries have changed places."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data)


def test_colours_are_those_that_the_profile_says(tmp_path, caplog):
    path, swapped = tmp_path / "dog.png", pixels(gradient())[..., ::-1]
    for mode in ("RGB", "RGBA"):
        gradient().convert(mode).save(path, icc_profile=profile_of_swapped_colours())
        assert abs(pixels(load_picture(path)) - swapped).max() <= 2
    with Image.open(path) as image:
        once = as_picture(image)
    assert (pixels(as_picture(once)) == pixels(once)).all()  # the profile is used up
    gradient().save(path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert (pixels(load_picture(path)) == pixels(gradient())).all()
    assert not caplog.records
    for broken in (b"no profile", profile_of_swapped_colours()[:200]):
        gradient().save(path, icc_profile=broken)
        assert [(pixels(load_picture(path)) == pixels(gradient())).all() for _ in range(2)] == [True, True]
    assert [record.getMessage()[:7] for record in caplog.records] == ["dog.png"] * 2  # once for each file as it is


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[-5, 512, 70000]], np.int32), [0, 2, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[float("nan"), 100, 300]], np.float32), [0, 100, 255]),
    ],
)
def test_pictures_in_memory_of_any_depth_are_shown_as_what_they_mean(values, expected):
    assert pixels(as_picture(Image.fromarray(values)))[0, :, 0].tolist() == expected


def test_every_mode_in_memory_becomes_what_a_viewer_shows():
    opaque, clear = Image.new("RGBA", (2, 2), (200, 0, 0, 255)), Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    for mode in ("RGBA", "RGBa"):
        assert as_picture(opaque.convert(mode)).getpixel((0, 0)) == (200, 0, 0)
        assert as_picture(clear.convert(mode)).getpixel((0, 0)) == (255, 255, 255)
        assert as_mask(Image.new("RGBA", (2, 2), "white").convert(mode)).getpixel((0, 0)) == 255
    deep = Image.fromarray(np.array([[7, 60000]], np.uint16))
    deep.info["transparency"] = 7
    assert pixels(as_picture(deep))[0, :, 0].tolist() == [255, 234]
    assert as_picture(Image.new("LA", (2, 2), (90, 255)).convert("La")).getpixel((0, 0)) == (90, 90, 90)
    with pytest.raises(DatasetError, match="more than 64 megapixels"):
        as_picture(Image.new("1", (8001, 8000)))


def test_a_picture_lying_on_its_side_is_the_upright_one_through_every_entrance(tmp_path):
    """Bit for bit, with alpha and all, wherever pictures and masks come in."""
    scene = gradient(64, 64)
    scene.putalpha(Image.linear_gradient("L").resize((64, 64)).rotate(90))
    exif, folders = Image.Exif(), {"upright": scene, "lying": scene.transpose(Image.Transpose.ROTATE_90)}
    exif[0x0112] = 6
    for name, image in folders.items():
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "dog.png", **({"exif": exif} if name == "lying" else {}))
    upright, lying = (tmp_path / name / "dog.png" for name in folders)
    judge, pipe = open_judge(), tiny.pipeline("sd1")
    entrances = {
        "file": load_picture,
        "memory": lambda path: as_picture(Image.open(path)),
        "mask": load_mask,
        "training": lambda path: prepare(instance_dataset(config(path.parent)).examples[0], 32, config(path.parent))[0],
        "masked": lambda path: prepare(Example(upright, "", path, 1, (64, 64)), 32, config(path.parent))[1],
        "check": lambda path: check_pictures([path], 32).pictures[0].crop,
        "--image": lambda path: picture_to_start_from(path, None, None, "image"),
        "--region": lambda path: region(f"a dog: {path}").mask,
        "Region": lambda path: Region("a dog", mask=Image.open(path)).mask,
        "references": lambda path: load_references([f"<dog>={path.parent}"])["<dog>"][0],
        "judge": lambda path: judge.pictures([Image.open(path)]),
        "sheet": lambda path: contact_sheet([[(Image.open(path), "")]]),
        "generate": lambda path: (
            generate(
                pipe,
                GenerationConfig(prompt="a dog", num_inference_steps=2, width=16, height=16),
                image=Image.open(path),
            )[0].image
        ),
    }
    for name, read in entrances.items():
        assert np.array_equal(np.asarray(read(upright)), np.asarray(read(lying))), name


def config(folder) -> TrainingConfig:
    return TrainingConfig(token="<dog>", instance_data_dir=folder)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_cut_has_the_shape_range_and_layout_of_training():
    made = cut(gradient(), gradient().convert("L"), 32)
    assert made.pixels.shape == (3, 32, 32) and made.pixels.dtype == torch.float32
    assert made.mask is not None and made.mask.shape == (1, 32, 32)
    assert -1 <= made.pixels.min() < -0.8 and 0.8 < made.pixels.max() <= 1
    assert made.mask.min() >= 0 and made.mask.max() <= 1
    assert made.original_size == (40, 48)
    assert made.pixels[0, 0, 0] < made.pixels[0, 0, -1]  # red grows to the right
    assert made.pixels[1, 0, 0] < made.pixels[1, -1, 0]  # green grows downwards


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (40, 40), (300, 41), (20_00, 33)])
def test_cutting_equals_resizing_then_cropping_the_middle(size):
    image = gradient(*size)
    made = cut(image, None, 32)
    scale = 32 / min(size)
    resized = image.resize((max(32, round(size[0] * scale)), max(32, round(size[1] * scale))), Image.Resampling.LANCZOS)
    top, left = made.crop_top_left
    assert (top, left) == ((resized.height - 32) // 2, (resized.width - 32) // 2)
    expected = pixels(resized.crop((left, top, left + 32, top + 32)))
    assert abs((made.pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() <= 1.01


def test_a_picture_of_the_right_size_keeps_every_bit():
    made = cut(gradient(32, 32), None, 32)
    assert ((made.pixels.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(int).tolist() == pixels(
        gradient(32, 32)
    ).tolist()


def test_random_cuts_follow_the_generator_and_move_picture_and_mask_alike():
    image = gradient(96, 32)
    options = {"center_crop": False, "random_flip": True}
    first = [cut(image, image.getchannel("R"), 32, generator=generator(i), **options) for i in range(20)]
    again = [cut(image, image.getchannel("R"), 32, generator=generator(i), **options) for i in range(20)]
    assert all(torch.equal(a.pixels, b.pixels) and a[2:] == b[2:] for a, b in zip(first, again, strict=True))
    assert len({made.crop_top_left for made in first}) > 5
    mirrored = [bool(made.pixels[0, 0, 0] > made.pixels[0, 0, -1]) for made in first]
    assert any(mirrored) and not all(mirrored)
    for made, flipped in zip(first, mirrored, strict=True):
        assert torch.allclose(made.mask, (made.pixels[:1] + 1) / 2, atol=0.02)
        # The place is that in the picture as mirrored: SDXL is told what a viewer of the cut would say.
        whole = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image
        left = made.crop_top_left[1]
        expected = pixels(whole.crop((left, 0, left + 32, 32)))
        assert abs((made.pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() <= 1.01
