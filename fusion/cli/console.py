"""What the verbs share at the terminal: the parser, messages, tables and sizes."""

import argparse
import contextlib
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fusion.errors import FusionError, closest

DTYPES = ("float32", "float16", "bfloat16")
_NUMBER = re.compile(r"[+-]?[\d.,]+")


class UsageError(FusionError):
    """The command was written wrongly; exit code 2."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as written, flags in a column as wide as they need."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=terminal_width())


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with suggestions for unknown flags, and one line for an error."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (.*)", message):
            flag = next((w for w in unknown[1].split() if w.startswith("--")), unknown[1])
            name = flag.partition("=")[0]
            message = f"there is no {name}{closest(name, self._option_string_actions)}"
        print(f"error: {message}\nSee {self.prog} --help.", file=sys.stderr)
        self.exit(2)


class _Handler(logging.Handler):
    """Log records as `warning: ...` on stderr, above a progress bar if one is running."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def listening(*, verbose: bool) -> Iterator[None]:
    """Show the library's log while a command runs."""
    logger, handler = logging.getLogger("fusion"), _Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def quiet() -> None:
    """Keep the advice of the libraries underneath off the terminal. They read this when imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    base = parser.add_argument_group("base")
    base.add_argument("--base", metavar="NAME", help="diffusers folder or hub id (default: the embedded pocket base)")
    base.add_argument("--device", metavar="NAME", help="cpu, cuda, mps, ... (default: the best there is)")
    base.add_argument("--dtype", metavar="TYPE", choices=DTYPES, help="default: float16 on a GPU, else float32")


def open_base(
    name: str | None,
    args: argparse.Namespace,
    dtype: str | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """A pipeline, without the bars of loading; those of a download stay."""
    import diffusers
    import transformers

    from fusion.models.bases import open_pipeline

    if not args.verbose:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    return open_pipeline(name, device=args.device, dtype=dtype, revision=revision, variant=variant)


def terminal_width() -> int:
    return min(shutil.get_terminal_size((110, 24)).columns, 110)


def short(path: Path) -> Path:
    """A path as seen from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def example(*words: object) -> str:
    """A command to type next, quoted for the shell."""
    return shlex.join(["fusion", *map(str, words)])


def bar() -> Any:
    """A progress bar that stays away until `advance` first moves it, and is seldom redrawn in files and pipes."""
    from tqdm import tqdm

    shape = "{percentage:3.0f}% {bar:30} {n}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    every = 0.1 if sys.stderr.isatty() else 60
    return tqdm(total=0, leave=False, mininterval=every, unit=" steps", bar_format=shape, delay=1e-9)


def advance(bar: Any, done: int, total: int, note: str = "") -> None:
    """Set a bar to `done` of `total`."""
    bar.total = total
    bar.set_postfix_str(note, refresh=False)
    bar.update(done - bar.n)


def notes(lines: Sequence[str]) -> None:
    """Print remarks, wrapped under their dashes."""
    for line in lines:
        print(
            textwrap.fill(
                line, terminal_width(), initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
            )
        )


def verdict(word: str, report: Any) -> None:
    """Print what `compatibility` says."""
    print(f"{word}: {report.sentence}")
    notes([*report.problems[1:], *report.advice])


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A heading and rows as lines with aligned columns; columns of numbers stand right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, numeric, strict=True)
        yield "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in cells).rstrip()


def size(path: Path) -> str:
    """`142 KB`, `8.7 MB`."""
    count, units = float(path.stat().st_size), ["bytes", "KB", "MB", "GB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.1f} {units[0]}" if units[0] in ("MB", "GB") and count < 100 else f"{count:.0f} {units[0]}"
