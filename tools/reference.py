"""Write docs/reference.md: the flags of every verb and the public names, from the code itself.

python -m tools.reference
"""

import argparse
import inspect
import re
from importlib import import_module
from pathlib import Path

import fusion
from fusion.cli import VERBS
from fusion.cli.console import Parser
from fusion.output_files import write_output

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
_BEGINNING = """# Reference

Written by `python -m tools.reference` from the code; change it there.

Settings have the same names in TOML files: those of `train` in `--config` files and under `[training]` of a base's
`fusion.toml`, those of `generate` under `[generation]`.
"""


def page() -> str:
    """The whole page."""
    parts = [_BEGINNING, "## Commands\n", *(_verb(verb) for verb in VERBS), "## Python\n", _names()]
    return "\n".join(parts)


def _verb(verb: str) -> str:
    module = import_module(f"fusion.cli.{verb}")
    parser = Parser(f"fusion {verb}", module.__doc__)
    module.add_arguments(parser)
    usage = parser.usage or f"fusion {verb} [options]"
    lines = [f"### fusion {verb}\n", f"```\n{usage}\n```\n", f"{_text((module.__doc__ or '').strip())}\n"]
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help not in (None, argparse.SUPPRESS) and a.dest != "help"]
        if actions:
            lines.append(f"| {_text(group.title or '')} | |\n|---|---|")
            lines += [f"| {_flags(action)} | {_cell(formatter._expand_help(action))} |" for action in actions]
            lines.append("")
    return "\n".join(lines)


def _flags(action: argparse.Action) -> str:
    """`--rank N`, or the name of a positional argument."""
    names = ", ".join(action.option_strings)
    value = action.metavar or (None if action.nargs == 0 else "|".join(map(str, action.choices or [])))
    words = " ".join(value) if isinstance(value, tuple) else value or ""
    return f"`{f'{names} {words}'.strip()}`".replace("|", "\\|")


def _names() -> str:
    rows: list[str] = []
    for name in sorted(fusion.__all__, key=str.lower):
        value = getattr(fusion, name)
        written = inspect.isroutine(value) or inspect.isclass(value)
        about = (inspect.getdoc(value) or "").partition("\n\n")[0] if written else "A table of " + ", ".join(value)
        about = "" if about.startswith(f"{name}(") else about  # what dataclass writes where there is no docstring
        rows.append(f"| `fusion.{name}` | {_cell(re.split(r'(?<=[.]) ', about)[0])} |")
    return "\n".join(["| name | |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return _text(" ".join(text.split())).replace("|", "\\|")


def _text(text: str) -> str:
    """Without what Markdown takes for HTML; what is in backticks stays as it is."""
    parts = text.split("`")
    return "`".join(part if n % 2 else part.replace("<", "&lt;").replace("*", "\\*") for n, part in enumerate(parts))


if __name__ == "__main__":
    write_output(PAGE, page().encode())
