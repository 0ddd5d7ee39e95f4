"""Moments survive their file, to far better than float32, and nothing else passes for them."""

import pytest
import torch

import tiny
from fusion.errors import FormatError
from fusion.formats.adapter_file import save
from fusion.formats.moments_file import load_moments, save_moments
from fusion.formats.safetensors_file import opened, write_file
from fusion.models.input_moments import record_moments
from trained import everywhere, trained_adapter


@pytest.fixture
def recorded():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, token, targets=everywhere(pipe)) for token in ("<rex>", "<tom>")]
    return record_moments(pipe, adapters, steps=1)


def test_saving_and_loading_keeps_what_was_recorded(recorded, tmp_path):
    save_moments(recorded, tmp_path / "both.safetensors")
    again = load_moments(tmp_path / "both.safetensors")
    assert [m.everywhere for m in again] == [m.everywhere for m in recorded]
    for one, two in zip(recorded, again, strict=True):
        assert one.layers.keys() == two.layers.keys()
        for name, moment in one.layers.items():
            torch.testing.assert_close(two.layers[name].own, moment.own, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(two.layers[name].free, moment.free, rtol=1e-12, atol=1e-14)
            assert two.layers[name].floor == pytest.approx(moment.floor, rel=1e-12)


def test_what_layers_share_is_written_once(recorded, tmp_path):
    save_moments(recorded[:1], tmp_path / "one.safetensors")
    different = {id(moment) for moment in recorded[0].layers.values()}
    with opened(tmp_path / "one.safetensors") as file:
        assert len(file.shapes) == 3 * len(different) < 3 * len(recorded[0].layers)


def test_other_files_are_refused(recorded, tmp_path):
    path = tmp_path / "file.safetensors"
    save(trained_adapter(tiny.pipeline("sd1")), path)
    with pytest.raises(FormatError, match="holds no moments"):
        load_moments(path)
    metadata = {"format": "spectral-moments", "format_version": "1"}
    for concepts in ("[", '[{"layers": {"a": "0"}}]', '[{"layers": {"a": "0"}, "everywhere": false}]'):
        write_file(path, {"0.own": torch.zeros(2, 4)}, {**metadata, "concepts": concepts}, "float32")
        with pytest.raises(FormatError, match="damaged"):
            load_moments(path)


@pytest.mark.parametrize("part", ["own", "free", "floor"])
def test_negative_means_of_squares_are_refused(part, recorded, tmp_path):
    path = tmp_path / "file.safetensors"
    save_moments(recorded[:1], path)
    with opened(path) as file:
        tensors, metadata = {name: file.tensor(name) for name in file.shapes}, file.metadata
    tensors[f"0.{part}"][:, 0] = -1.0  # the first entry of a triangle is of the diagonal
    write_file(path, tensors, metadata, "float32")
    with pytest.raises(FormatError, match="moment 0 has negative means of squares"):
        load_moments(path)
