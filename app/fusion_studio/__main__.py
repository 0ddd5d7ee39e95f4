"""`python -m fusion_studio`: the studio in the browser, for this machine only unless --host names another address."""

import argparse
import os
import threading
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusion_studio", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", help="base model: a diffusers folder or hub id (default: the embedded pocket)")
    parser.add_argument("--library", type=Path, default=Path("out"), help="folder of adapters (default: out)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets in everyone who can reach this machine")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--auth", type=Path, metavar="FILE", help="let in only who is in FILE, a line each: name:password"
    )
    args = parser.parse_args()
    auth = read_accounts(args.auth, parser) if args.auth else None
    print("Starting the studio ...", flush=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported, so that nothing is sent to its makers
    # Before torch is: a thread that spins while it waits for another takes its core from the browser beside it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # read at import: advice for their own users
        os.environ.setdefault(name, "error")

    from fusion_studio.interface import build
    from fusion_studio.session import Session
    from fusion_studio.theme import launch_options

    session = Session(args.base, args.library)
    threading.Thread(target=session.warm_up, name="opening", daemon=True).start()
    page = build(session)
    address = {"server_name": args.host, "server_port": args.port, "quiet": True, "prevent_thread_lock": True}
    try:
        page.launch(auth=auth, **address, **launch_options())
    except OSError as error:  # the port is taken
        parser.exit(1, f"{error}\n")
    if not auth and args.host not in ("127.0.0.1", "localhost", "::1"):
        print("Everyone who can reach this machine can use this studio; --auth FILE asks for a password.")
    print(f"Open {page.local_url} in a browser. Ctrl-C ends it.", flush=True)
    page.block_thread()


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
