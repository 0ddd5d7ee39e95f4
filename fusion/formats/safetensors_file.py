"""safetensors files: read with suspicion, written whole or not at all.

Knows tensors, names and metadata strings; what they mean is for its siblings.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusion.errors import ConfigError, FormatError, closest

MAX_HEADER = 32 * 2**20  # bytes; ten fused SDXL adapters need five of these megabytes
MAX_TENSORS = 100_000
MAX_DIMENSION = 2**24
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

# What people hand over in place of a safetensors file, by its first bytes.
_STRANGERS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it (.pt, .ckpt): that can run code when opened"),
    (b"\x80", "a Python pickle (.pt, .ckpt, .bin): that can run code when opened"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8", "a JPEG picture"),
    (b"GGUF", "a GGUF file"),
    (b"<", "a web page, as failed downloads leave behind"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with 'git lfs pull'"),
)


class TensorInfo(NamedTuple):
    dtype: str  # "F32", "F16" or "BF16"
    shape: tuple[int, ...]


class Header(NamedTuple):
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


class OpenFile:
    """A checked file: its header, and tensors on demand."""

    def __init__(self, path: Path, handle: Any, header: Header) -> None:
        self.path, self.header, self._handle = path, header, handle

    def tensor(self, name: str) -> Tensor:
        """One tensor in memory of its own: what the file is later turned into does not matter. Never inf or NaN."""
        tensor: Tensor = self._handle.get_tensor(name).clone()
        if not tensor.isfinite().all():
            raise FormatError(f"'{self.path}' is spoilt: {name} holds NaN or infinite values.")
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
        with safe_open(file, framework="pt", device="cpu") as handle:
            yield OpenFile(file, handle, _checked_header(file, handle))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"'{file}' is damaged or cut short: {error}. Fetch or save it again.") from error


def read_header(path: str | os.PathLike[str]) -> Header:
    """Metadata, and every tensor's dtype and shape. Reads no tensor."""
    with opened(path) as file:
        return file.header


def _check_beginning(path: Path) -> None:
    """Tell what a file is if it cannot be safetensors: eight bytes of header length, then JSON."""
    if path.is_dir():
        raise FormatError(f"'{path}' is a folder; name the .safetensors file in it.")
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
            size = os.fstat(stream.fileno()).st_size
    except FileNotFoundError:
        near = closest(path.name, [p.name for p in path.parent.glob("*.safetensors")])
        raise FormatError(f"There is no file '{path}'{near}") from None
    except OSError as error:
        raise FormatError(f"'{path}' cannot be read: {error.strerror}.") from error
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= size - 8:
        if length > MAX_HEADER:
            raise FormatError(f"'{path}' has a header of {length:,} bytes; at most {MAX_HEADER:,} are read.")
        return
    found = next((what for magic, what in _STRANGERS if start.startswith(magic)), "not a safetensors file")
    found = "empty" if not size else "a safetensors file cut short" if start[8:9] == b"{" else found
    raise FormatError(f"'{path}' is {found}. A .safetensors file is needed.")


def _checked_header(path: Path, handle: Any) -> Header:
    names = list(handle.keys())
    if len(names) > MAX_TENSORS:
        raise FormatError(f"'{path}' holds {len(names):,} tensors; at most {MAX_TENSORS:,} are read.")
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        entry = handle.get_slice(name)
        info = TensorInfo(str(entry.get_dtype()), tuple(entry.get_shape()))
        if info.dtype not in _CODES.values():
            raise FormatError(f"'{path}': {name} is of type {info.dtype}; float16, bfloat16 or float32 is needed.")
        if len(info.shape) > 4 or any(n > MAX_DIMENSION for n in info.shape):
            raise FormatError(f"'{path}': {name} has shape {info.shape}, which no layer has.")
        tensors[name] = info
    return Header(dict(handle.metadata() or {}), tensors)


def cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors as a file is to hold them. Raises FormatError for values that are not finite, or not in `dtype`."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, got '{dtype}'{closest(dtype, DTYPES)}")
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        exact = tensor.detach()
        made[name] = exact.to("cpu", DTYPES[dtype]).contiguous()
        if not made[name].isfinite().all():
            if not exact.isfinite().all():
                raise FormatError(
                    f"{name} holds NaN or infinite values, so there is nothing to save; was it trained well?"
                )
            largest = float(exact.abs().max())
            raise FormatError(f"{name} reaches {largest:.3g}, beyond {dtype}; save with dtype='float32'.")
    return made


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (as `cast` gives them) and metadata to a .safetensors file, whole or not at all.

    Equal content gives equal bytes; the safetensors package orders metadata differently in every process.
    """
    ordered, offset = _in_file_order(tensors), 0
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    target = safetensors_target(path)
    write_whole(target, [len(text).to_bytes(8, "little"), text, *(raw_bytes(tensor) for _, tensor in ordered)])


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything behind the header of a file with these tensors."""
    sha = hashlib.sha256()
    for _, tensor in _in_file_order(tensors):
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bits of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Widest dtype first, as the format wants for alignment, then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def safetensors_target(path: str | os.PathLike[str]) -> Path:
    """A path that may be written to. Raises FormatError for a folder, or a name other programs would not open."""
    target = Path(path)
    if target.is_dir():
        raise FormatError(f"'{target}' is a folder; name the file to write, like '{target / 'dog.safetensors'}'.")
    if target.suffix != ".safetensors":
        raise FormatError(f"'{target}' must end in .safetensors: '{target.with_name(target.name + '.safetensors')}'.")
    return target


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file under another name beside `path`, then move it there: no reader ever sees half of it."""
    working = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with working.open("xb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        working.replace(path)
    except OSError as error:
        raise FormatError(f"'{path}' cannot be written: {error.strerror}.") from error
    finally:
        with suppress(OSError):
            working.unlink(missing_ok=True)
