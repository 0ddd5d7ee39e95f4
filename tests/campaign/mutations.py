"""Valid files, changed at random: values of JSON and TOML, headers and tensors of safetensors files, bytes."""

import copy
import json
import math
import random
import struct
from contextlib import suppress
from typing import Any

NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 8, 2**15, 2**16, 2**24, 2**24 + 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *(-(2**63), 1.5, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
)
STRINGS = (
    *("", " ", "\0", "a\0b", "<rex>", "<>", "<REX>", "<a b>", "../../x", "/etc/passwd", "~nobodyhere/x", "~"),
    *("x" * 300, "x" * 5000, "é" * 50, "\u202e", "😀", "\ud83d", "<script>alert(1)</script>", "a\nb", "unet"),
    *("{token}", "[trigger]", "NaN", "none", "float16", "latest", "-1", "１２", "İ", "\uffff", "0 0 0.5 1", "nan"),
)
KEYS = ("name", "token", "type", "slices", "box", "mask", "prompt", "settings", "strength", "file")
FILLS = {
    "F32": [struct.pack("<f", value) for value in (math.nan, math.inf, 3e38, -3e38, 0.0, 1e-45)],
    "F16": [struct.pack("<e", value) for value in (math.nan, math.inf, 65504.0, 0.0)],
    "BF16": [b"\x80\x7f", b"\xc0\x7f", b"\x7f\x7f"],
}
SIZES = {"F16": 2, "BF16": 2, "F32": 4}


class Mutations:
    """Random changes under one seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def value(self, depth: int = 0) -> Any:
        """Anything that JSON can hold."""
        kind = self.random.randrange(9 if depth < 3 else 5)
        if kind < 5:
            choices = (self.random.choice(NUMBERS), self.random.choice(STRINGS), None, self.chance(0.5))
            return (*choices, self.random.randrange(-5, 50))[kind]
        if kind < 7:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        keys = [self.random.choice(STRINGS + KEYS) for _ in range(self.random.randrange(4))]
        return {key: self.value(depth + 1) for key in keys}

    def changed(self, data: Any, share: float = 0.25) -> Any:
        """A JSON value with one or several of its parts changed, removed, repeated or exchanged."""
        if self.chance(share * 0.3):
            return self.value()
        if isinstance(data, dict):
            table = {key: self.changed(part, share) for key, part in data.items()}
            return self._changed_table(table) if self.chance(4 * share) else table
        if isinstance(data, list):
            items = [self.changed(part, share) for part in data]
            return self._changed_list(items) if self.chance(4 * share) else items
        return self._changed_scalar(data) if self.chance(share) else data

    def _changed_table(self, table: dict) -> dict:
        key = self.random.choice(list(table)) if table else ""
        match self.random.randrange(8):
            case 0 if table:
                table.pop(key)
            case 1:
                table[self.random.choice(STRINGS)] = self.value()
            case 2 if table:
                table[key] = self.value()
            case 3 if len(table) > 1:
                other = self.random.choice(list(table))
                table[key], table[other] = table[other], table[key]
        return table

    def _changed_list(self, items: list) -> list:
        match self.random.randrange(8):
            case 0 if items:
                items.pop(self.random.randrange(len(items)))
            case 1 if items:
                items.append(copy.deepcopy(self.random.choice(items)))
            case 2:
                items.append(self.value())
            case 3 if items:
                items *= self.random.choice((2, 3, 500))
        return items

    def _changed_scalar(self, data: Any) -> Any:
        other = self.value()
        match data:
            case bool():
                return self.random.choice((not data, other))
            case int():
                return self.random.choice((data + 1, data - 1, -data, data * 1000, self.random.choice(NUMBERS), other))
            case float():
                return self.random.choice((self.random.choice(NUMBERS), -data, data * 1e30, other))
            case str():
                text = self.random.choice(STRINGS)
                return self.random.choice((text, data + text, data.upper(), data[:-1], data * 50, other))
        return other

    def text(self, data: Any) -> str:
        """JSON, now and then nested too deeply, with endless blanks or cut."""
        text = json.dumps(data, ensure_ascii=self.chance(0.5))
        match self.random.randrange(80):
            case 0 | 1 | 2:
                return "[" * self.random.choice((200, 5000, 100_000)) + text
            case 3 | 4:
                depth = self.random.choice((200, 5000, 60_000))
                return '{"a":' * depth + "1" + "}" * self.random.choice((0, depth))
            case 5 | 6:
                return text.replace(":", ":" + " " * 5000, 1)
            case 7:
                return text[: self.random.randrange(len(text) + 1)]
        return text

    def encoded(self, data: Any) -> bytes:
        return self.text(data).encode("utf-8", "surrogatepass")

    def damaged(self, data: bytes) -> bytes:
        """Some bytes changed, the end cut off, or more of it."""
        raw = bytearray(data)
        for _ in range(self.random.choice((1, 2, 8, 64))):
            raw[self.random.randrange(len(raw))] = self.random.randrange(256)
        if self.chance(0.3):
            del raw[self.random.randrange(len(raw)) :]
        return bytes(raw) + (self.random.randbytes(self.random.randrange(5000)) if self.chance(0.1) else b"")

    def safetensors(self, data: bytes) -> bytes:
        """A safetensors file whose metadata, header, shapes or values are others."""
        if self.chance(0.12):
            return self.damaged(data)
        end = 8 + int.from_bytes(data[:8], "little")
        file = _File(json.loads(data[8:end]), bytearray(data[end:]), self)
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            file.change()
        return file.joined()


class Unchanged(Mutations):
    """No change at all, and the first of every choice: what comes out has to be accepted."""

    def __init__(self) -> None:
        self.random = _First()

    def chance(self, share: float) -> bool:
        return False

    def changed(self, data: Any, share: float = 0.25) -> Any:
        return data

    def text(self, data: Any) -> str:
        return json.dumps(data)

    def damaged(self, data: bytes) -> bytes:
        return data

    def safetensors(self, data: bytes) -> bytes:
        return data


class _First(random.Random):
    def random(self) -> float:
        return 0.15  # below it, most writers would make something special

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def randrange(self, *_: int) -> int:
        return 0


class _File:
    """A safetensors file in parts."""

    def __init__(self, header: dict[str, Any], data: bytearray, mutations: Mutations) -> None:
        self.metadata: Any = header.pop("__metadata__", {})
        self.header, self.data, self.mutations, self.random = header, data, mutations, mutations.random

    def joined(self) -> bytes:
        entries = self.metadata
        if isinstance(entries, dict) and self.random.random() < 0.97:
            entries = {str(k): v if isinstance(v, str) else self.mutations.text(v) for k, v in entries.items()}
        text = self.mutations.encoded({"__metadata__": entries, **self.header})
        text += b" " * self.random.choice((0, 0, 0, 5, 4000))
        length = len(text)
        if self.random.random() < 0.03:
            length = self.random.choice((0, 1, 7, length - 1, length + 1, length * 2, 2**31, 2**32, 2**62, 2**64 - 1))
        return length.to_bytes(8, "little") + text + bytes(self.data)

    def change(self) -> None:
        names = list(self.header)
        name = self.random.choice(names) if names else ""
        if isinstance(self.metadata, dict) and self.random.random() < 0.45:
            self._change_metadata()
        elif name and isinstance(self.header[name], dict):
            # What was changed before may have no such part any more.
            with suppress(KeyError, TypeError, ValueError, IndexError):
                self.random.choice((self._claim, self._fill, self._resize, self._rename, self._drop))(name)
        elif self.random.random() < 0.2:
            for number in range(self.random.choice((1, 10, 3000))):
                empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(self.data)] * 2}
                self.header[f"{self.random.choice(STRINGS)}{number}"] = empty

    def _change_metadata(self) -> None:
        key = self.random.choice([*self.metadata, *STRINGS[:3], "ss_base_model_version", "lora_adapter_metadata"])
        share = self.random.choice((0.1, 0.3, 0.8))
        match self.random.randrange(8):
            case 0:
                self.metadata.pop(key, None)
            case 1:
                self.metadata[key] = self.random.choice((*STRINGS, "1", "2", "spectral-adapter", "x" * 100_000))
            case 2:
                self.metadata = self.mutations.changed(self.metadata, 0.5)
            case _:
                try:
                    table = json.loads(self.metadata.get(key, "{}"))
                except (ValueError, TypeError, RecursionError):  # of an earlier change
                    table = {}
                self.metadata[key] = self.mutations.text(self.mutations.changed(table, share))

    def _claim(self, name: str) -> None:
        """Another shape, dtype or place than the data have."""
        entry = self.header[name]
        side = self.random.choice((0, 1, 2, -1, 2**24, 2**40))
        shapes = ([], [0], [1] * 5, entry["shape"][::-1], [*entry["shape"], 1], [side, side], self.mutations.value())
        dtypes = ("F16", "F32", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "XX", "", 5)
        offsets = ([0, 0], [0, len(self.data)], [-1, 4], [4, 0], [0, 2**62], [2**63] * 2, self.mutations.value())
        key = self.random.choice(("shape", "dtype", "data_offsets"))
        entry[key] = self.random.choice({"shape": shapes, "dtype": dtypes, "data_offsets": offsets}[key])

    def _fill(self, name: str) -> None:
        """Other values: NaN, infinite, huge, zero; one of them or all."""
        start, end = self.header[name]["data_offsets"]
        one = self.random.choice(FILLS.get(self.header[name]["dtype"], [b"\xff"]))
        count = 1 if self.random.random() < 0.5 else (end - start) // len(one)
        at = start + len(one) * self.random.randrange(max(1, (end - start) // len(one) - count + 1))
        self.data[at : at + count * len(one)] = one * count

    def _resize(self, name: str) -> None:
        """One dimension longer or shorter, and the data with it."""
        shape = self.header[name]["shape"]
        side = self.random.randrange(len(shape))
        shape[side] = max(0, shape[side] + self.random.choice((-1, 1, -shape[side], 3)))
        size = math.prod(shape) * SIZES[self.header[name]["dtype"]]
        self._place({name: (self._piece(name) + bytes(size))[:size]})

    def _drop(self, name: str) -> None:
        del self.header[name]
        self._place({})

    def _rename(self, name: str) -> None:
        others = (name + "x", name.upper(), f"0.{name}", f"1.{name}", name.replace("unet", "vae"), name[1:])
        others += (name.replace("mid_block", "down_blocks.99"), name.replace("lora_unet", "lora_te"))
        others += (name.replace("text_encoder", "text_encoder_2"), self.random.choice(STRINGS))
        self.header[self.random.choice(others)] = self.header.pop(name)

    def _piece(self, name: str) -> bytes:
        start, end = self.header[name]["data_offsets"]
        return bytes(self.data[start:end])

    def _place(self, other: dict[str, bytes]) -> None:
        """Put all tensors one behind the other, some with other data."""
        pieces = {name: other.get(name) or self._piece(name) for name in self.header}
        self.data = bytearray()
        for name, piece in pieces.items():
            self.header[name]["data_offsets"] = [len(self.data), len(self.data) + len(piece)]
            self.data += piece
