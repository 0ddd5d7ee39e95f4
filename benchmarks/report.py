"""Markdown: sections with tables, each replaceable without the others, and the name of the machine."""

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusion.output_files import write_output

TITLE = "# Benchmarks"


@dataclass
class Section:
    """The results of one measurement."""

    title: str
    text: str
    tables: list[str] = field(default_factory=list[str])

    def markdown(self) -> str:
        return "\n\n".join([f"## {self.title}", self.text, *self.tables])


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bar(value: float, limit: float, unit: str = "×") -> str:
    """A value and its bar: `0.960× (bar 1.03×: met)`."""
    return f"{value:.3f}{unit} (bar {limit:g}{unit}: {'met' if value <= limit else '**missed**'})"


def machine() -> str:
    return (
        f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__.partition('+')[0]} "
        f"with {torch.get_num_threads()} threads, load {os.getloadavg()[1]:.1f} over five minutes."
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(path: Path, sections: Iterable[Section]) -> None:
    """Write sections into `path`; those under other titles stay, in their order."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = {part.partition("\n")[0]: f"## {part.strip()}" for part in ("\n" + old).split("\n## ")[1:]}
    for section in sections:
        parts[section.title] = section.markdown()
    write_output(path, ("\n\n".join([TITLE, *parts.values()]) + "\n").encode())
