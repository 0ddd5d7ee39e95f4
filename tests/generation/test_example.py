"""The picture that shows a base at its best, and the picture beside an adapter."""

import numpy as np
import pytest
from PIL import Image

import fusion
import tiny
from fusion.errors import ConfigError
from trained import trained_adapter


def test_a_base_says_what_shows_it_at_its_best(tmp_path):
    (tmp_path / "fusion.toml").write_text('[example]\nprompt = "a boat"\nseed = 7\n')
    assert fusion.base_example(tmp_path) == fusion.GenerationConfig(prompt="a boat", seed=7)
    (tmp_path / "fusion.toml").write_text("[generation]\nsteps = 3\n")
    assert fusion.base_example(tmp_path) == fusion.base_example("somebody/model") == fusion.base_example("x" * 5000)
    assert fusion.base_example() != fusion.base_example(tmp_path)  # the embedded base has its own


@pytest.mark.parametrize("line", ["num_images = 200", "seed = -1", "seed = true", 'prompt = ""', 'promt = "a"'])
def test_an_example_is_read_strictly(line, tmp_path):
    (tmp_path / "fusion.toml").write_text(f"[example]\n{line}\n")
    with pytest.raises(ConfigError, match=rf"the base's fusion\.toml: .*{line.partition(' ')[0]}"):
        fusion.base_example(tmp_path)


def test_the_picture_of_an_adapter_replaces_only_its_own_kind(tmp_path):
    pipe, file = tiny.pipeline("sd1"), tmp_path / "rex.safetensors"
    adapter = trained_adapter(pipe, "<rex>")
    image = fusion.draw_adapter_picture(pipe, adapter, seed=3)
    config = fusion.GenerationConfig(prompt="a <rex>", seed=3)
    assert np.array_equal(image, fusion.generate(pipe, config, [adapter])[0].image)
    assert fusion.save_adapter_picture(file, image) == tmp_path / "rex.png"
    with Image.open(tmp_path / "rex.png") as saved:
        assert np.array_equal(saved, image)
    assert fusion.save_adapter_picture(file, Image.new("RGBA", (600, 300)))  # a newer one
    with Image.open(tmp_path / "rex.png") as saved:
        assert saved.size == (256, 128)
    drawing = fusion.generate(pipe, config, [adapter])[0]
    fusion.save_adapter_picture(tmp_path / "tom.safetensors", Image.new("RGB", (40, 40), "red"))
    parts = [tmp_path / f"{name}.safetensors" for name in ("rex", "tom", "nobody")]
    assert fusion.join_adapter_pictures(parts, tmp_path / "both.safetensors")
    with Image.open(tmp_path / "both.png") as saved:
        assert saved.size == (256, 256) and saved.getpixel((20, 20)) == (0, 0, 0)
        assert saved.getpixel((236, 20)) == saved.getpixel((130, 250)) == (255, 0, 0)
    assert fusion.join_adapter_pictures(parts[2:], tmp_path / "none.safetensors") is None
    for foreign in (drawing.save, image.save, lambda path: path.write_text("no picture")):
        foreign(tmp_path / "rex.png")
        before = (tmp_path / "rex.png").read_bytes()
        assert fusion.save_adapter_picture(file, image) is None
        assert (tmp_path / "rex.png").read_bytes() == before
