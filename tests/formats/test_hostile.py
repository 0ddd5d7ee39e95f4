"""Files that are not what they claim: each is refused in a sentence, none can crash, hang or fill the memory."""

import json
import pickle
import random
import struct
import time

import pytest
import torch
from safetensors.torch import save

import tiny
from fusion.adapters import ADAPTERS
from fusion.errors import FormatError, FusionError, UnknownName
from fusion.formats import adapter_file, safetensors_file
from fusion.formats.adapter_file import load

TARGETS = ("unet.mid_block.*.attn2.to_k", "unet.mid_block.*.attn2.to_v")
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def small(trained, tmp_path):
    """A file of two layers."""
    path = tmp_path / "rex.safetensors"
    adapter_file.save(trained(tiny.pipeline("sd1"), targets=TARGETS), path, "float32")
    return path


def parts(path):
    """Header as JSON, and the data behind it."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(path, header, data):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit(path, **metadata):
    header, data = parts(path)
    header["__metadata__"] |= metadata
    put(path, header, data)


def rename(path, old, new):
    header, data = parts(path)
    header[new] = header.pop(old)
    put(path, header, data)


def tensors_of(path):
    with safetensors_file.opened(path) as file:
        return {name: file.tensor(name) for name in file.shapes}, file.metadata


def rewrite(path, change):
    """The file again, with its tensors changed, through the safetensors package itself."""
    tensors, metadata = tensors_of(path)
    change(tensors)
    path.write_bytes(save(tensors, metadata))


def both_refuse(path, reason, kind=FormatError):
    for read in (load, adapter_file.read_info):
        with pytest.raises(kind, match=reason):
            read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"abc", "not a safetensors file"),
        (b"PK\x03\x04" + b"\0" * 200, r"zip archive.*can run code"),
        (pickle.dumps({"weights": list(range(500))}), r"pickle.*can run code"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "not a safetensors file"),
        (b"<!DOCTYPE html><html>" + b" " * 100, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "Git LFS pointer"),
        ((2**62).to_bytes(8, "little") + b'{"a": 1}', "has a header of 4,611,686,018,427,387,904 bytes"),
        ((2**20).to_bytes(8, "little") + b'{"a": 1}', "cut short"),
        ((10).to_bytes(8, "little") + b"{not json}" + b"\0" * 8, "damaged or cut short"),
    ],
)
def test_other_files_are_called_by_their_name(content, reason, tmp_path):
    (tmp_path / "rex.safetensors").write_bytes(content)
    both_refuse(tmp_path / "rex.safetensors", reason)


def test_a_pickle_is_never_run(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "rex.safetensors")
    both_refuse(tmp_path / "rex.safetensors", r"zip archive, as torch.save writes it")


def test_missing_files_and_folders(small):
    with pytest.raises(FormatError, match=r"no file .*did you mean 'rex.safetensors'"):
        load(small.with_name("rax.safetensors"))
    with pytest.raises(FormatError, match="is no file"):
        load(small.parent)


def test_truncated_anywhere(small):
    whole = small.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), len(whole) // 60)]:
        small.write_bytes(whole[:length])
        both_refuse(small, "rex")


def test_a_header_that_lies_costs_nothing(small):
    header, data = parts(small)
    started = time.monotonic()
    for shape, offsets in [
        ([2**40, 2**40], [0, 64]),
        ([2**20, 2**20], [0, 2**42]),
        ([16], [0, 2**50]),
        ([16], [-64, 0]),
        ([16], [64, 0]),
        ([0, 2**60], [0, 0]),
        ([0, 2**24, 2**24, 2**24], [0, 0]),
    ]:
        lying = {name: dict(entry) for name, entry in header.items()}
        lying[f"{LAYER}.dU"] |= {"shape": shape, "data_offsets": offsets}
        put(small, lying, data)
        both_refuse(small, "rex")
    put(small, b"{" + b" " * (40 * 2**20) + b"}", b"")
    both_refuse(small, "header of 41,943,042 bytes")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.complex64])
def test_only_floats(small, dtype):
    rewrite(small, lambda tensors: tensors.update({f"{LAYER}.dS": tensors[f"{LAYER}.dS"].to(dtype)}))
    both_refuse(small, "float16, bfloat16 or float32 is needed")


def test_missing_and_left_over_keys_are_listed(small):
    rename(small, f"{LAYER}.dU", f"{LAYER}.dX")
    both_refuse(small, rf"unexpected tensors: {LAYER}.dX")
    rewrite(small, lambda tensors: tensors.pop(f"{LAYER}.dX"))
    both_refuse(small, rf"lacks {LAYER}.dU")


@pytest.mark.parametrize(
    "key", ["evil.layer.dU", f"1.{LAYER}.dU", f"../../{LAYER}.dU", "dU", "vae.token.<rex>", "é" * 50]
)
def test_strange_keys_are_listed(small, key):
    rewrite(small, lambda tensors: tensors.update({key: torch.zeros(3)}))
    both_refuse(small, "unexpected")


def test_shapes_that_do_not_fit_each_other(small):
    whole = small.read_bytes()
    for part, shape in [
        ("dU", (32, 4)),
        ("basis.S", (5,)),
        ("dV", (32, 4, 1)),
        ("dS", (1, 4)),
        ("basis.V", (4, 32)),
        ("dS", ()),
    ]:
        small.write_bytes(whole)
        rewrite(small, lambda tensors, p=part, s=shape: tensors.update({f"{LAYER}.{p}": torch.zeros(s)}))
        both_refuse(small, "does not fit its layer")
    small.write_bytes(whole)
    rewrite(small, lambda t: t.update({k: v[..., :2].contiguous() for k, v in t.items() if k.startswith(LAYER)}))
    both_refuse(small, r"does not fit its layer \{'R': 4")


def test_token_rows_are_what_the_concept_says(small):
    whole = small.read_bytes()
    rewrite(small, lambda t: t.update({"text_encoder.token.<rex>": torch.zeros(2, 32)}))
    both_refuse(small, "<rex> has 1 vectors")
    small.write_bytes(whole)
    rename(small, "text_encoder.token.<rex>", "text_encoder.token.<tom>")
    both_refuse(small, "has (an|no) embedding")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e18])
def test_values_that_are_no_numbers(small, bad):
    rewrite(small, lambda tensors: tensors[f"{LAYER}.dU"].view(-1)[3:4].fill_(bad))
    with pytest.raises(FormatError, match="NaN or infinite"):
        load(small)


def test_newer_and_nonsense_versions(small):
    edit(small, format_version="2")
    both_refuse(small, "format_version '2', but 1 is read; a newer one needs an update")
    for version in ("", "one", "-1", "²", "9" * 5000):
        edit(small, format_version=version)
        both_refuse(small, "format_version")


def test_an_unknown_type_is_met_with_a_suggestion(small):
    header, _ = parts(small)
    branch = json.loads(header["__metadata__"]["adapter"])
    branch[0]["type"] = "adittive"
    edit(small, adapter=json.dumps(branch))
    both_refuse(small, "did you mean 'additive'", UnknownName)
    assert "additive" in ADAPTERS


BOMBS = [
    "",
    "{",
    "null",
    "[]",
    "[[]]",
    "3",
    '"text"',
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 100_000,
    "1e999999",
    "[1e999999]",
    "NaN",
    "[null]",
    "[{}]",
]
FIELDS = [
    ("adapter", "slices", [[0, 4]]),
    ("adapter", "slices", [[0, 4, 0]]),
    ("adapter", "slices", [[0, 10**12, 1]]),
    ("adapter", "slices", [[1000, 4, 1]]),
    ("adapter", "slices", [[0, 1, 1]] * 1001),
    ("adapter", "slices", [["0", "4", "1"]]),
    ("adapter", "slices", "0-3"),
    ("adapter", "strength", "1"),
    ("adapter", "strength", float("nan")),
    ("adapter", "strength", 10**400),
    ("adapter", "strength", True),
    ("adapter", "gate", ["<other>"]),
    ("adapter", "gate", [["<rex>"]]),
    ("adapter", "gate", "<rex>"),
    ("adapter", "targets", [1]),
    ("adapter", "name", None),
    ("concepts", "token", "rex"),
    ("concepts", "token", "<rex>\n"),
    ("concepts", "vectors", 10**9),
    ("concepts", "vectors", 1.0),
    ("concepts", "extra", 1),
]


@pytest.mark.parametrize("key", ["adapter", "base", "concepts", "provenance"])
def test_metadata_of_the_wrong_shape(small, key):
    for bomb in BOMBS:
        if (key, bomb) in {("base", "null")}:
            continue
        edit(small, **{key: bomb})
        both_refuse(small, "rex")


@pytest.mark.parametrize(("key", "field", "value"), FIELDS, ids=lambda value: str(value)[:20])
def test_fields_of_the_wrong_kind(small, key, field, value):
    header, _ = parts(small)
    entries = json.loads(header["__metadata__"][key])
    entries[0][field] = value
    edit(small, **{key: json.dumps(entries)})
    both_refuse(small, "rex")


@pytest.mark.parametrize("key", ["adapter", "concepts"])
def test_endless_lists_cost_no_time(small, key):
    header, _ = parts(small)
    edit(small, **{key: json.dumps(json.loads(header["__metadata__"][key]) * 20_000)})
    started = time.monotonic()
    both_refuse(small, "more than 1000 branches or concepts")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("key", ["format_version", "adapter", "base", "concepts", "provenance", "name"])
def test_metadata_that_are_missing(small, key):
    header, data = parts(small)
    del header["__metadata__"][key]
    put(small, header, data)
    both_refuse(small, key)


def test_no_flipped_byte_is_more_than_a_refusal(small):
    whole, chance = small.read_bytes(), random.Random(0)
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    survived = 0
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3, 20))):
            raw[chance.randrange(header_end if chance.random() < 0.8 else len(raw))] = chance.randrange(256)
        small.write_bytes(raw)
        try:
            load(small).digest()
            survived += 1
        except FusionError:
            pass
    assert survived < 300
