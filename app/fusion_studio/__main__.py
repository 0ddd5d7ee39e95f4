"""The studio in the browser, for this machine only unless --host names another address."""

import argparse
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import fusion
from fusion_studio.access import LOOPBACK, is_host_name

# Ctrl+C, and what Docker, a shutdown or a closed terminal sends.
ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusion_studio", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    with suppress(KeyboardInterrupt):  # before there was anything to close
        run(parser.parse_args())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    parser.set_defaults(parser=parser)
    text = "base model: diffusers folder, hub id or .safetensors checkpoint (default: the embedded pocket)"
    parser.add_argument("--base", metavar="NAME", help=text)
    for setting in base_options():
        choices = {"choices": setting.choices} if setting.choices else {"type": setting.parse}
        parser.add_argument(f"--{setting.name}", help=setting.help, **choices)
    parser.add_argument("--device", metavar="NAME", help="cpu, gpu, cuda:1, mps, ... (default: the best there is)")
    text = "also with adapters of another base, if their layers have the shapes of this one's"
    parser.add_argument("--other_base", action="store_true", help=text)
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet: faster drawing after the first picture"
    )
    parser.add_argument("--library", type=Path, default=Path("out"), help="folder of adapters (default: out)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets in everyone who can reach this machine")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--auth", type=Path, metavar="FILE", help="let in only who is in FILE, a line each: name:password"
    )
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a further name under which browsers reach the studio, as behind a proxy; can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--allowed-frame", action="append", default=[], metavar="NAME",
        help="a site whose pages may show the studio in a frame, as huggingface.co for a Space; can be repeated",
    )  # fmt: skip


def base_options() -> list[Any]:
    """How a base is opened: the settings of trainings that are about it, but its name."""
    return [s for s in fusion.settings_of(fusion.TrainingConfig) if s.group == "base"][1:]


def run(args: argparse.Namespace) -> None:
    """Open the studio, and keep it open until Ctrl+C or a signal ends it."""
    parser: argparse.ArgumentParser = args.parser
    if wrong := [name for name in [*args.allowed_host, *args.allowed_frame] if not is_host_name(name)]:
        parser.error(f"'{wrong[0]}' is no name of a host, such as studio.example.org: no scheme, no port.")
    auth = read_accounts(args.auth, parser) if args.auth else None
    print("Starting the studio ...", flush=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported, so that nothing is sent to its makers
    # Before torch is: a thread that spins while it waits for another takes its core from the browser beside it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # read at import: advice for their own users
        os.environ.setdefault(name, "error")

    for number in ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores that the terminal is closed
            signal.signal(number, end)

    from fusion_studio.session import Session

    options = {s.name: value for s in base_options() if (value := getattr(args, s.name)) is not None}
    options |= {"other_base": True} if args.other_base else {}
    # Before gradio is imported: the session has the folder for gradio's files.
    session = Session(args.base, args.library, device=args.device, compiled=args.compile, **options)
    try:
        serve(session, args, auth, parser)
    except KeyboardInterrupt:
        pass
    finally:
        print("Ending the studio ...", flush=True)
        session.close()


def serve(
    session: Any, args: argparse.Namespace, auth: list[tuple[str, str]] | None, parser: argparse.ArgumentParser
) -> None:
    """Open the page and keep it open until the program is ended."""
    from fusion_studio.interface import build
    from fusion_studio.theme import launch_options

    threading.Thread(target=session.warm_up, name="opening", daemon=True).start()
    page = build(session)
    try:
        options = launch_options(args.host, args.allowed_host, args.allowed_frame)
        page.launch(auth=auth, server_port=args.port, quiet=True, prevent_thread_lock=True, **options)
    except (OSError, ValueError) as error:  # the port is taken; or gradio does not reach its own page
        parser.exit(1, f"{error}\n")
    if not auth and args.host not in LOOPBACK:
        print("Everyone who can reach this machine can use this studio; --auth FILE asks for a password.")
    print(f"Open {page.local_url} in a browser. Ctrl-C ends it.", flush=True)
    threading.Event().wait()


def end(number: int, frame: FrameType | None) -> None:
    """The program ends with the status that shells give for a signal, and 0 after Ctrl+C.

    Ending takes seconds; in them, further signals do nothing. Objects that the signal left half made may fail when they
    are deleted; of that nothing is shown.
    """
    sys.unraisablehook = lambda _: None
    for other in ENDINGS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def read_accounts(file: Path, parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """Names and passwords; from a file, because other users of the machine can see the flags of a command."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        parser.exit(1, f"'{file}' cannot be read: {error}\n")
    pairs = [tuple(line.strip().split(":", 1)) for line in lines]
    if not pairs or not all(len(pair) == 2 and all(pair) for pair in pairs):
        parser.exit(1, f"'{file}' needs lines of the form name:password.\n")
    return [(pair[0], pair[1]) for pair in pairs]


if __name__ == "__main__":
    main()
