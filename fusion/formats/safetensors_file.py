"""safetensors files: checked when they are read, written whole or not at all.

Only tensors, names and metadata strings; what they mean is known by the other modules of this folder.
"""

import hashlib
import json
import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fusion.errors import ConfigError, FormatError, OutputError, closest
from fusion.output_files import write_output

MAX_HEADER = 32 * 2**20  # bytes; ten fused SDXL adapters need five of these megabytes
MAX_SIDE = 2**24
MAX_VALUE = 1e15  # the product of two, summed over any rank, is a float32
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Other kinds of files, by their first bytes.
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it (.pt, .ckpt): that can run code when opened",
    b"\x80": "a Python pickle (.pt, .ckpt, .bin): that can run code when opened",
    b"<": "a web page, as failed downloads leave behind",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with 'git lfs pull'",
}


@dataclass(frozen=True)
class Header:
    """What a file says it holds, whatever the kinds of its tensors."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # in the format's words: F16, I64, F8_E4M3 …


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header alone, checked against the file's length. Raises FormatError as `opened` does."""
    file = Path(path)
    _check_beginning(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            entries = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            shapes = {name: tuple(entry.get_shape()) for name, entry in entries.items()}
            dtypes = {name: str(entry.get_dtype()) for name, entry in entries.items()}
            return Header(dict(handle.metadata() or {}), shapes, dtypes)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"'{file}' is damaged or cut short: {error}. Fetch or save it again.") from error


class OpenFile:
    """A checked file: its metadata and the shapes of its tensors, and tensors on demand."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path, self._handle = path, handle
        self.metadata: dict[str, str] = dict(handle.metadata() or {})
        self.shapes: dict[str, tuple[int, ...]] = {}
        names: list[str] = list(handle.keys())
        if any(name.startswith("model.diffusion_model.") for name in names):  # they may hold numbers of any kind
            raise FormatError(f"'{path}' is a whole model and no adapter; give it as the base (--base).")
        for name in names:
            entry = handle.get_slice(name)
            kind, shape = entry.get_dtype(), tuple(entry.get_shape())
            floats = ("F16", "BF16", "F32")
            if math.prod(shape) == 1 and name.endswith(".alpha"):  # some programs write it as an integer
                floats += ("F64", "I64", "I32", "I16", "U8")
            if kind not in floats or len(shape) > 4 or max(shape, default=0) > MAX_SIDE:
                raise FormatError(
                    f"'{path}': {name} is {kind} of shape {shape}; float16, bfloat16 or float32 is needed, of at most "
                    f"4 dimensions up to {MAX_SIDE:,}."
                )
            self.shapes[name] = shape

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, which does not change with the file.

        Raises FormatError for NaN, infinite values, and those whose products would be infinite.
        """
        tensor: Tensor = self._handle.get_tensor(name).clone()
        tensor = tensor if tensor.dtype in DTYPES.values() else tensor.float()
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= MAX_VALUE:  # NaN is not
            raise FormatError(f"'{self.path}' is damaged: {name} holds NaN or infinite values, or beyond 1e15.")
        return tensor

    def head(self, name: str, rows: int) -> Tensor:
        """The first `rows` of a tensor along dimension 0, unchecked; nothing else is read."""
        return self._handle.get_slice(name)[:rows].clone()


@contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[OpenFile, None, None]:
    """Open a safetensors file for reading; everything its header claims is checked before anything is allocated.

    Raises FormatError for a missing, foreign, damaged or oversized file, and for tensors that are not floats.
    """
    file = Path(path)
    _check_beginning(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:  # checks sizes and offsets against the file
            yield OpenFile(file, handle)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"'{file}' is damaged or cut short: {error}. Fetch or save it again.") from error


def _check_beginning(path: Path) -> None:
    """Raise FormatError with the kind of a file that is not eight bytes of header length, then JSON."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise FormatError(f"'{path}' is no file.")
        with path.open("rb") as stream:
            start = stream.read(64)
    except FileNotFoundError:
        near = closest(path.name, [p.name for p in path.parent.glob("*.safetensors")])
        raise FormatError(f"There is no file '{path}'{near}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(f"'{path}' cannot be read: {reason}.") from error
    if start[8:9] != b"{":
        otherwise = "not a safetensors file" if start else "empty"
        kind = next((kind for magic, kind in _OTHER_KINDS.items() if start.startswith(magic)), otherwise)
        raise FormatError(f"'{path}' is {kind}. A .safetensors file is needed.")
    if (length := int.from_bytes(start[:8], "little")) > MAX_HEADER:
        raise FormatError(f"'{path}' has a header of {length:,} bytes; at most {MAX_HEADER:,} are read.")


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: str, *,
    hashes: Mapping[str, str] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Write tensors as `dtype`, and metadata, to a .safetensors file, whole or not at all.

    `hashes`: entries that get the SHA-256 of what follows the header, behind a beginning such as "0x".
    Equal content gives equal bytes; the safetensors package alone orders metadata differently in every process.
    Raises FormatError for values that `dtype` cannot hold, OutputError for a path that cannot be written.
    """
    if not str(path).endswith(".safetensors"):
        raise OutputError(f"'{path}' cannot be written: name a file that ends in .safetensors.")
    data = memoryview(save(_cast(tensors, dtype), dict(metadata)))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))
    if hashes:
        digest = hashlib.sha256(data[end:]).hexdigest()
        header["__metadata__"] = {**metadata, **{key: f"{beginning}{digest}" for key, beginning in hashes.items()}}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_output(path, len(text).to_bytes(8, "little"), text, data[end:])


def _cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Copies on the CPU: the safetensors package refuses tensors that share memory."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, got '{dtype}'{closest(dtype, DTYPES)}")
    copies = {name: t.detach().to("cpu", DTYPES[dtype], copy=True).contiguous() for name, t in tensors.items()}
    for name, tensor in copies.items():
        if not tensor.isfinite().all():
            raise FormatError(
                f"{name} reaches {float(tensors[name].abs().max()):.3g}, which {dtype} cannot hold; save with "
                "dtype='float32', or train at a lower learning rate if these are not finite numbers."
            )
    return copies
