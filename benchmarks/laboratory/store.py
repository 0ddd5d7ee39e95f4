"""Cells: results stored under the hash of their inputs, so that a rerun computes only what changed."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

HOME = Path.home() / ".cache" / "spectral-fusion" / "laboratory"


class Busy(Exception):
    """Another process is making this cell now."""


class Missing(Exception):
    """This cell does not exist yet, and this store only reads."""


class Store:
    """A folder of complete cells: each is made under another name and moved into place."""

    def __init__(self, folder: Path = HOME, *, wait: bool = True, make: bool = True) -> None:
        """`wait` for a cell that another process is making, otherwise raise Busy; `make` none: raise Missing."""
        self.folder, self.wait, self.make = folder, wait, make

    def cell(self, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of this cell, which `make(folder)` fills if it does not exist yet. `inputs` are JSON values."""
        text = json.dumps({"kind": kind, **inputs}, sort_keys=True)
        cell = self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:16]
        if cell.is_dir():
            return cell
        if not self.make:
            raise Missing(f"{kind} {cell.name}")
        cell.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{cell}.lock", timeout=-1 if self.wait else 0):
                if not cell.is_dir():
                    new = Path(f"{cell}.new")
                    shutil.rmtree(new, ignore_errors=True)
                    new.mkdir()
                    (new / "inputs.json").write_text(json.dumps(json.loads(text), indent=1) + "\n", encoding="utf-8")
                    make(new)
                    new.rename(cell)
        except Timeout:
            raise Busy(f"{kind} {cell.name}") from None
        return cell

    def numbers(self, kind: str, inputs: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """A cell of JSON: what `measure()` returns now, or returned when the cell was made."""

        def make(folder: Path) -> None:
            (folder / "result.json").write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")

        return json.loads((self.cell(kind, inputs, make) / "result.json").read_text(encoding="utf-8"))


def digest(*files: Path) -> str:
    """One hash of the contents of files."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]
