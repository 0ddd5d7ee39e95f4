"""The command line: one file per verb, each a public function of the library.

A verb's module has `add_arguments(parser)` and `run(args) -> int | None`; only `run` imports what is heavy, so help is
immediate. Printing belongs here and nowhere else in the library.
"""

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

from fusion.cli.console import Parser, UsageError, showing_logs
from fusion.cli.progress_bar import showing_units
from fusion.errors import FusionError, closest

VERBS = {
    "check": "check pictures before training on them",
    "train": "train an adapter for a concept on a folder of pictures",
    "fuse": "make several adapters one",
    "generate": "draw pictures, with adapters or without",
    "inspect": "show what adapter files hold and whether they can be used together",
    "library": "list, import, rename and delete adapters; show who owns which slice",
    "export": "write an adapter as a LoRA for other programs",
    "push": "share an adapter on the Hugging Face Hub",
    "space": "write a Space for the Hub that runs the studio",
    "bake": "add an adapter into a copy of the base",
    "comfyui": "write the nodes for ComfyUI",
    "evaluate": "measure adapters in weights and in model output",
    "compare": "draw one prompt over strengths, methods and adapters",
    "doctor": "try a base on this machine, and print a report",
    "demo": "teach three concepts to the embedded base, and draw them together",
    "studio": "open the studio in the browser",
}
DESCRIPTION = "Teach Stable Diffusion personal concepts as spectral adapters, and fuse them into one picture."
EXAMPLE = """a first session:
  fusion train --instance_data_dir assets/concepts/owl --token "<owl>" --noun owl
  fusion train --instance_data_dir assets/concepts/robot --token "<robot>" --noun robot
  fusion fuse out/owl.safetensors out/robot.safetensors -o both.safetensors
  fusion generate both.safetensors --prompt "a <owl> beside a <robot>"
"""

_LONG = re.compile(r"(\S{300})\S+")  # a name of thousands of letters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 an error of the user's or the system's (one line), 2 wrong usage.

    130 after Ctrl+C and 143 after SIGTERM, which Docker, Slurm and a shutdown send: both end a command alike.
    """
    words, signals = list(sys.argv[1:] if argv is None else argv), list[int]()
    try:
        with interrupts(signals):
            verb = choose(words[:1])
            args = arguments(verb, words[1:])
            with showing_logs(verbose=args.verbose), showing_units():
                return import_module(f"fusion.cli.{verb}").run(args) or 0
    except SystemExit as leaving:  # argparse has printed help or an error
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        pass
    except Exception as error:
        # Compiled code, such as safetensors', makes an error of its own of an interrupt within it.
        if not signals:
            code = exit_code(error)
            if code is None:
                raise
            return code
    print("interrupted", file=sys.stderr)
    return 143 if signal.SIGTERM in signals else 130


def exit_code(error: Exception) -> int | None:
    """Print what the user or the system did wrong in one line; None for any other error."""
    if isinstance(error, FusionError):
        print("error:", re.sub(r"\s*\n\s*", " ", _LONG.sub(r"\1…", str(error))), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, BrokenPipeError):  # whoever read the output, such as head, has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (for the flush when Python ends)
        return 1
    if isinstance(error, OSError):
        place = f"'{error.filename}': " if error.filename else ""
        print(f"error: {place}{error.strerror or error}.", file=sys.stderr)
        return 1
    if isinstance(error, MemoryError | RuntimeError):
        from fusion.models.devices import memory_line

        if line := memory_line(error):
            advice = "what helps: --dtype bfloat16, in drawing --low_memory, and smaller or fewer pictures at a time."
            print(f"error: {line}; {advice}", file=sys.stderr)
            return 1
    return None


@contextmanager
def interrupts(signals: list[int]) -> Generator[None]:
    """Raise KeyboardInterrupt on SIGTERM as on SIGINT, and add what came to `signals`.

    Objects that an interrupt left half made may fail when they are deleted; of that nothing is shown.
    """

    def interrupt(number: int, _frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    def unraisable(error: Any) -> None:
        if not signals:
            show(error)

    numbers, show = [signal.SIGTERM], sys.unraisablehook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in numbers}
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = show
        for number, handler in before.items():
            signal.signal(number, handler)


def choose(first: list[str]) -> str:
    """The verb; help, version and mistakes leave by SystemExit as argparse does."""
    table = "\n".join(f"  {verb:<10}{what}" for verb, what in VERBS.items())
    parser = Parser("fusion", DESCRIPTION)
    parser.usage = "fusion <command> [options]"
    parser.epilog = f"commands:\n{table}\n\n{EXAMPLE}\nfusion <command> --help lists the options."
    parser.add_argument("--version", action="version", version=f"spectral-fusion {version()}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    verb = parser.parse_args(first).command
    if verb is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if verb not in VERBS:
        parser.error(f"there is no command '{verb}'{closest(verb, VERBS)}")
    return verb


def arguments(verb: str, words: Sequence[str]) -> argparse.Namespace:
    module = import_module(f"fusion.cli.{verb}")
    parser = Parser(f"fusion {verb}", module.__doc__)
    module.add_arguments(parser)
    text = "also show messages of torch, diffusers and transformers"
    parser.add_argument("--verbose", action="store_true", help=text)
    args = parser.parse_intermixed_args(words)
    args.words = [verb, *words]
    return args


def version() -> str:
    try:
        return metadata.version("spectral-fusion")
    except metadata.PackageNotFoundError:
        return "(not installed)"
