"""The cache gives what the SVD gives, computes it once, and replaces damaged files."""

import logging

import pytest
import torch

from fusion.library import spectrum_cache
from fusion.library.spectrum_cache import cache_folder, cached_spectrum
from fusion.spectral.spectrum import decompose


@pytest.fixture
def svds(monkeypatch):
    """Every SVD that is made."""
    made = []

    def counted(weight, depth=None):
        made.append(weight.shape)
        return decompose(weight, depth)

    monkeypatch.setattr(spectrum_cache, "decompose", counted)
    return made


def same(one, two):
    return all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (200, 180)])
def test_the_second_time_costs_no_svd(shape, svds, tmp_path):
    weight = torch.randn(shape)
    for depth in (8, 3, 16, 500):
        assert same(cached_spectrum(weight, depth, tmp_path), decompose(weight, depth))
    assert len(svds) == (1 if min(shape) <= 128 else 2)  # deeper than ever before: once more
    assert same(cached_spectrum(weight, 150, tmp_path), decompose(weight, 150)) and len(svds) <= 2


def test_every_bit_of_a_weight_counts(svds, tmp_path):
    weight = torch.randn(8, 6)
    other = weight.clone()
    other[0, 0] = torch.nextafter(other[0, 0], torch.tensor(9.0))
    for one in (weight, other, weight.half(), weight.reshape(6, 8), weight.bfloat16(), weight.T):
        cached_spectrum(one, 4, tmp_path)
    assert len(svds) == len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "zero", "nan", "junk", "foreign", "other", "keys"])
def test_a_damaged_file_is_made_again(damage, svds, tmp_path, caplog):
    weight = torch.randn(24, 16)
    expected = cached_spectrum(weight, 8, tmp_path)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    if damage == "foreign":
        cached_spectrum(torch.randn(24, 15), 8, tmp_path)
        raw = next(p for p in tmp_path.iterdir() if p != path).read_bytes()
    elif damage == "other":  # the directions of another weight of the same shape
        cached_spectrum(torch.randn(24, 16), 8, tmp_path)
        raw = next(p for p in tmp_path.iterdir() if p != path).read_bytes()
    elif damage == "keys":
        raw = raw.replace(b'"U"', b'"W"')
    else:
        raw = {"cut": raw[:-9], "zero": raw[:-800] + b"\0" * 800, "nan": raw[:-800] + b"\xff" * 800, "junk": b"hello"}[
            damage
        ]
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert same(cached_spectrum(weight, 16, tmp_path), decompose(weight, 16))
    assert "damaged and is computed again" in caplog.text
    count = len(svds)
    assert same(cached_spectrum(weight, 8, tmp_path), expected) and len(svds) == count


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    weight = torch.randn(8, 6)
    with caplog.at_level(logging.WARNING):
        assert same(cached_spectrum(weight, 4, tmp_path / "file"), decompose(weight, 4))
    assert "cannot be used" in caplog.text


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "spectra"
    cached_spectrum(torch.randn(4, 4), 2)
    assert len(list((tmp_path / "spectra").iterdir())) == 1
    monkeypatch.delenv("FUSION_CACHE")
    assert cache_folder().parts[-3:] == (".cache", "spectral-fusion", "spectra")
