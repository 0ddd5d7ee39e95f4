"""What the verbs share at the terminal: the parser, flags, messages, tables and sizes."""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import warnings
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from fusion.config import MAX_STRENGTH, Setting, StrictModel, bounds, settings_of
from fusion.errors import FusionError, closest
from fusion.training.config import TrainingConfig

DTYPES = ("float32", "float16", "bfloat16")
LARGE_BASE = 5e8  # parameters whose opening is announced
BASE_NAMES = ("--base", "--pretrained_model_name_or_path")
# How a base is opened, as open_pipeline takes it.
BASE_OPTIONS = [s for s in settings_of(TrainingConfig) if s.group == "base" and f"--{s.name}" not in BASE_NAMES]
SWITCHES = ("other_base", "low_memory")
LOW_MEMORY = (
    "for large pictures on a small GPU: only the model that computes is there, and the VAE works in tiles; slower"
)


class UsageError(FusionError):
    """The command was written wrongly; exit code 2."""


class Parser(ArgumentParser):
    """argparse without abbreviations, with suggestions for unknown flags, and one line for an error."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_help)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = [str(word).partition("=")[0] for word in args or ()]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if of_number := re.match(r"argument (\S+): (must be .*)", message):
            names = of_number[1].split("/")
            message = f"{next((name for name in names if name in self._words), names[0])} {of_number[2]}"
        if unknown := re.match(r"unrecognized arguments: (.*)", message):
            flag = next((w for w in unknown[1].split() if w.startswith("--")), unknown[1])
            name = flag.partition("=")[0]
            message = f"there is no {name}{closest(name, self._option_string_actions)}"
        print(f"error: {message}\nSee {self.prog} --help.", file=sys.stderr)
        self.exit(2)


def _help(prog: str) -> RawDescriptionHelpFormatter:
    """Paragraphs as written, flags in a column as wide as they need."""
    return RawDescriptionHelpFormatter(prog, max_help_position=34, width=terminal_width())


class _Handler(logging.Handler):
    """Log records as `warning: ...` on stderr, above a progress bar if one is running."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def showing_logs(*, verbose: bool) -> Generator[None]:
    """Show the library's log while a command runs, and with `verbose` the messages of the libraries it uses."""
    logger, handler = logging.getLogger("fusion"), _Handler()
    level, environment = logger.level, dict(os.environ)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    with warnings.catch_warnings():
        variables = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY")  # both are read at import
        for name in variables:
            os.environ.setdefault(name, "warning" if verbose else "error")
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name in variables:
                if name not in environment:  # a caller's own processes are none of ours
                    os.environ.pop(name, None)
            logger.removeHandler(handler)
            logger.setLevel(level)


def add_settings(
    parser: ArgumentParser,
    model: type[StrictModel],
    leave: Sequence[str] = (),
    prefix: str = "",
    defaults: Mapping[str, object] | None = None,
) -> None:
    """A flag for every setting of a model but those of `leave`; `flags_of` reads what was given.

    `prefix` begins the titles of the groups in help; `defaults` are the verb's own, for help alone.
    """
    groups: dict[str, Any] = {}
    for setting in settings_of(model):
        if setting.name in leave:
            continue
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(f"{prefix}{setting.group}")
        default = (defaults or {}).get(setting.name, setting.default)
        add_setting(groups[setting.group], replace(setting, default=default))


def add_setting(group: Any, setting: Setting) -> None:
    """A flag for one setting."""
    default = "" if setting.default in (None, "") else f" (default: {json.dumps(setting.default, default=str)})"
    others = f" Also {', '.join(f'--{other}' for other in setting.aliases)}." if setting.aliases else ""
    text = f"{setting.help}{others}{default}".replace("%", "%%")
    reading: dict[str, Any] = {"type": setting.parse, "metavar": metavar(setting)}
    if setting.choices:
        reading = {"choices": setting.choices}
    elif {tuple, str} <= setting.kinds:  # one text or several
        reading = {"action": "append", "metavar": "TEXT"}
    elif list in setting.kinds:
        words = {"action": _words(setting)} if str not in setting.kinds else {}
        reading = {"nargs": "+", "metavar": "TEXT", **words}
    elif bool in setting.kinds:  # --random_flip as in diffusers' scripts, --random_flip false as in TOML
        reading |= {"nargs": "?", "const": True}
    group.add_argument(f"--{setting.name}", default=SUPPRESS, help=text, **reading)
    for other in setting.aliases:
        group.add_argument(f"--{other}", dest=setting.name, default=SUPPRESS, help=SUPPRESS, **reading)


def _words(setting: Setting) -> type[Action]:
    """Reads the words of a list: separate ones, and within each what commas separate."""

    class Words(Action):
        def __call__(self, _parser: Any, namespace: Namespace, values: Any, _flag: str | None = None) -> None:
            setattr(namespace, self.dest, setting.parse(",".join([*values, ""])))

    return Words


def metavar(setting: Setting) -> str:
    names = {bool: "true|false", int: "N", float: "X", Path: "PATH"}
    return next((name for kind, name in names.items() if kind in setting.kinds), "TEXT")


def flags_of(args: Namespace, model: type[StrictModel]) -> dict[str, Any]:
    """The settings given on the command line."""
    return {name: value for name, value in vars(args).items() if name in model.model_fields}


def number(kind: type[int | float], least: float, most: float) -> Callable[[str], Any]:
    """What reads a number that is no setting of a model; NaN and what is out of bounds are refused."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number, got '{text[:100]}'") from None
        if not least <= value <= most:
            raise ArgumentTypeError(f"{bounds(least, most)}, got {text[:100]}")
        return value

    return read


def add_base_arguments(
    parser: ArgumentParser, dtype: str = "bfloat16 or float16 on a GPU, else float32", *, draws: bool = False
) -> None:
    """What `open_base` reads; `dtype` says in help what is the default, `draws` is for commands that draw."""
    group = parser.add_argument_group("base")
    add_base(group)
    group.add_argument("--dtype", metavar="TYPE", choices=DTYPES, help=f"default: {dtype}")
    if draws:
        group.add_argument("--low_memory", action="store_true", help=LOW_MEMORY)


def add_base(group: Any, purpose: str = "") -> None:
    """Which base, how it is opened, and where it runs; `purpose` begins the help."""
    text = f"{purpose}diffusers folder, hub id or .safetensors checkpoint (default: the embedded pocket base)"
    group.add_argument(*BASE_NAMES, dest="base", metavar="NAME", help=text)
    for setting in BASE_OPTIONS:
        add_setting(group, setting)
    text = f"{purpose}cpu, gpu, cuda:1, mps, ... (default: the best there is)"
    group.add_argument("--device", metavar="NAME", help=text)
    text = f"{purpose}also with adapters of another base, if their layers have the shapes of this one's"
    group.add_argument("--other_base", action="store_true", help=text)


def base_flags(name: str | None, options: Namespace | TrainingConfig) -> list[str]:
    """The flags by which another command opens the same base."""
    values = {"base": name, **{s.name: getattr(options, s.name, None) for s in BASE_OPTIONS}}
    texts = {key: json.dumps(value) if isinstance(value, bool) else str(value) for key, value in values.items()}
    words = [word for key, text in texts.items() if values[key] is not None for word in (f"--{key}", text)]
    return words + [f"--{name}" for name in SWITCHES if getattr(options, name, False)]


def add_file_arguments(parser: ArgumentParser, what: str) -> None:
    """Where and how an adapter is written."""
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FILE", help=f"{what}, .safetensors")
    add("--rank", type=number(int, 1, 65_536), metavar="N", help="compress to this rank (default: exact)")
    add(
        "--energy",
        type=number(float, 1e-6, 1),
        metavar="X",
        help="compress, keeping this share of each layer's energy, as 0.99",
    )
    add("--dtype", default="float16", metavar="TYPE", choices=DTYPES, help="of the file (default: float16)")
    add_overwrite(parser)


def add_overwrite(parser: ArgumentParser) -> None:
    """What `check_output` reads."""
    parser.add_argument("--overwrite", action="store_true", help="replace files that this command has not made")


def add_strengths(parser: ArgumentParser) -> None:
    """How strongly adapters act."""
    text = "one number for each adapter (default: 1)"
    parser.add_argument("--strength", nargs="+", type=STRENGTH, metavar="X", help=text)


def open_base(name: str | None, args: Namespace, dtype: str | None, settings: TrainingConfig | None = None) -> Any:
    """The pipeline of the command's base, device and dtype; how it is opened is in the flags, or in `settings`."""
    from fusion.base_models.opening import open_pipeline

    options: dict[str, Any] = {s.name: getattr(settings or args, s.name, None) for s in BASE_OPTIONS}
    options |= {name: getattr(args, name, False) for name in SWITCHES}  # which not every command has
    announce(name)
    return open_pipeline(name, device=args.device, dtype=dtype, **options)


def announce(name: str | None) -> None:
    """Print what is opened, where that takes a while."""
    from fusion.models.stored_weights import stored_parameters

    path = str(name or "")
    parameters = stored_parameters(Path(path)) if os.path.exists(path) else 0  # noqa: PTH110 (Path.exists raises)
    if parameters > LARGE_BASE:
        print(f"opening {Path(path).name}: {parameters / 1e9:.1f} billion parameters", file=sys.stderr, flush=True)


def on_base(adapters: list[Any], args: Namespace) -> list[Any]:
    """The adapters, with the weights of --base where their changes depend on them (DoRA)."""
    if args.base is None or not any(adapter.needs_base for adapter in adapters):
        return adapters
    from fusion.models.base_check import with_base_weights

    pipe = open_base(args.base, args, None)
    return [with_base_weights(pipe, adapter) for adapter in adapters]


STRENGTH = number(float, -MAX_STRENGTH, MAX_STRENGTH)


def terminal_width() -> int:
    return min(shutil.get_terminal_size((110, 24)).columns, 110)


def relative(path: Path) -> Path:
    """A path relative to the working folder, where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def example(*words: object) -> str:
    """A command to type next, quoted for the shell."""
    return shlex.join(["fusion", *map(str, words)])


def resume_hint(checkpoint: Path | None, resumed: str | None, words: Sequence[str]) -> str:
    """How to continue after `checkpoint`, the run's latest, with the command that `words` are.

    The command names the checkpoint: "latest" may be another run's by then. `resumed`: what this run was resumed from.
    """
    if checkpoint is None and resumed:
        return f"There is no new checkpoint yet; continue from the same one with:\n  {example(*words)}"
    if checkpoint is None:
        return "There is no checkpoint yet; --checkpointing_steps N writes one every N steps."
    flag, name = "--resume_from_checkpoint", f"{checkpoint.parent.name}/{checkpoint.name}"
    again = [word for before, word in pairwise(["", *words]) if flag not in (before, word.partition("=")[0])]
    return f"Continue after {checkpoint.name} with:\n  {example(*again, flag, name)}"


def print_list(lines: Sequence[str]) -> None:
    """Print sentences, each wrapped behind a dash."""
    for line in lines:
        print_labelled("  - ", line)


def print_labelled(label: str, text: str) -> None:
    """Print a text, wrapped beside its label."""
    indent = " " * len(label)
    print(textwrap.fill(text, terminal_width(), initial_indent=label, subsequent_indent=indent, break_on_hyphens=False))


def print_compatibility(word: str, report: Any) -> None:
    """Print the verdict of `compatibility`, its reasons and its advice."""
    print(f"{word}: {report.sentence}")
    print_list([*report.problems[1:], *report.advice])


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Print a heading and rows in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(indent + "  ".join(map(str.ljust, row, widths)).rstrip())


def file_size(path: Path) -> str:
    """`142kB`, `8.70MB`."""
    from tqdm import tqdm

    return tqdm.format_sizeof(path.stat().st_size, "B")
