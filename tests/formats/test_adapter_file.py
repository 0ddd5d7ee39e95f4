"""The native file: what is saved is loaded, to the bit, and nothing else is."""

import json
import os

import pytest
import torch
from safetensors import safe_open

import tiny
from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import BaseInfo
from fusion.errors import ConfigError, FormatError
from fusion.formats import adapter_file, safetensors_file
from fusion.formats.adapter_file import load


def no_svd(*_args, **_options):
    raise AssertionError("a file needs no SVD")


def same(one, two, dtype=None):
    """Equal to the bit, `one` cast to `dtype` first."""
    assert (one.info, one.gated, one.slices) == (two.info, two.gated, two.slices)
    for a, b in zip(one.branches, two.branches, strict=True):
        assert (a.name, a.type, a.slices, a.targets, a.gate, a.strength) == (
            *(b.name, b.type, b.slices, b.targets, b.gate, b.strength),
        )
        assert set(a.layers) == set(b.layers)
        for name in a.layers:
            state, again = a.layers[name].state_dict(), b.layers[name].state_dict()
            assert state.keys() == again.keys()
            for key in state:
                assert torch.equal(state[key].to(dtype or state[key].dtype), again[key]), (name, key)
    for token, rows in one.tokens.items():
        for component, row in rows.items():
            assert torch.equal(row.to(dtype or row.dtype), two.tokens[token][component])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_trained_adapter_comes_back_without_svd(kind, dtype, trained, tmp_path, monkeypatch):
    adapter = trained(tiny.pipeline("sd1"), kind, vectors=2)
    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    adapter_file.save(adapter, tmp_path / "rex.safetensors", dtype)
    torch.manual_seed(99)
    again = load(tmp_path / "rex.safetensors")
    same(adapter, again, getattr(torch, dtype))
    tolerance = {"float32": 0, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for name, delta in adapter.deltas().items():
        got = again.deltas()[name].dense()
        assert got.dtype == torch.float32
        assert torch.linalg.norm(got - delta.dense()) <= tolerance * delta.norm() + 1e-7
    if dtype == "float32":
        assert adapter.digest() == again.digest()


def test_every_family_and_several_branches(pipe, trained, side_by_side, wide, tmp_path):
    one = trained(pipe, "additive", targets=wide(pipe), gated=False)
    two = trained(pipe, "rotational", k=1, token="<tom>", noun="cat", vectors=3)
    fused = side_by_side(one, two, strengths=[1.0, -0.25])
    adapter_file.save(fused, tmp_path / "both.safetensors", "float32")
    again = load(tmp_path / "both.safetensors")
    same(fused, again)
    assert again.gated and again.branches[1].strength == -0.25


def test_equal_adapters_give_equal_bytes(trained, tmp_path):
    adapter = trained(tiny.pipeline("sd1"))
    for name in ("a", "b"):
        adapter_file.save(adapter, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    adapter_file.save(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_other_programs_can_read_what_is_in_it(trained, tmp_path):
    adapter = trained(tiny.pipeline("sd1"))
    adapter_file.save(adapter, tmp_path / "rex.safetensors", "float32")
    with safe_open(tmp_path / "rex.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        assert torch.equal(file.get_tensor("text_encoder.token.<rex>"), adapter.tokens["<rex>"]["text_encoder"])
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.basis.U" in keys
    assert metadata["format"] == "spectral-adapter" and metadata["format_version"] == "1"
    assert json.loads(metadata["adapter"])[0]["slices"] == [[0, 4, 1]]
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/spectral-adapter"
    assert metadata["modelspec.trigger_phrase"] == "<rex>"


def test_the_header_tells_everything_but_the_values(trained, side_by_side, tmp_path, monkeypatch):
    pipe, path = tiny.pipeline("sd1"), tmp_path / "both.safetensors"
    fused = side_by_side(trained(pipe), trained(pipe, k=3, token="<tom>", noun="cat"))
    adapter_file.save(fused, path)
    monkeypatch.setattr(safetensors_file.OpenFile, "tensor", None)
    info = adapter_file.read_info(path)
    assert (info.info, info.slices, info.size) == (fused.info, fused.slices, path.stat().st_size)
    for said, branch in zip(info.branches, fused.branches, strict=True):
        assert (said.name, said.type, said.gate, set(said.layers)) == (
            *(branch.name, branch.type, branch.gate, set(branch.layers)),
        )


def test_a_loaded_adapter_does_not_follow_its_file(trained, tmp_path):
    path = tmp_path / "rex.safetensors"
    adapter_file.save(trained(tiny.pipeline("sd1")), path)
    adapter = load(path)
    before = adapter.digest()
    with path.open("r+b") as stream:
        stream.seek(-5000, os.SEEK_END)
        stream.write(b"\0" * 5000)
    assert adapter.digest() == before


def test_what_cannot_be_stored_is_refused_and_leaves_the_old_file(trained, tmp_path):
    path = tmp_path / "rex.safetensors"
    adapter = trained(tiny.pipeline("sd1"))
    adapter_file.save(adapter, path)
    before = path.read_bytes()
    layer = next(iter(adapter.layers.values()))
    layer.dU.data[0, 0] = 1e6
    with pytest.raises(FormatError, match=r"1e\+06, which float16 cannot hold; save with dtype='float32'"):
        adapter_file.save(adapter, path)
    layer.dU.data[0, 0] = float("nan")
    with pytest.raises(FormatError, match="reaches nan"):
        adapter_file.save(adapter, path, "float32")
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        adapter_file.save(adapter, path, "float61")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["rex.safetensors"]


def test_a_failed_write_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    path = tmp_path / "rex.safetensors"
    adapter = trained(tiny.pipeline("sd1"))
    adapter_file.save(adapter, path)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FormatError, match="No space left"):
        adapter_file.save(adapter, path, "float32")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", [".", "rex"])
def test_a_senseless_path_is_refused(name, trained, tmp_path):
    with pytest.raises(FormatError, match=r"name a file that ends in \.safetensors"):
        adapter_file.save(trained(tiny.pipeline("sd1")), tmp_path / name)


def test_folders_are_made(trained, tmp_path):
    adapter = trained(tiny.pipeline("sd1"))
    adapter_file.save(adapter, tmp_path / "new" / "deep" / "rex.safetensors")
    base = load(tmp_path / "new" / "deep" / "rex.safetensors").info.base
    assert base == BaseInfo("sd1", "unnamed", "epsilon", adapter.info.base.digest)
