"""`python -m app`: the studio in the browser, on this machine only unless told otherwise."""

import argparse
import os
import threading
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", help="base model: a diffusers folder or hub id (default: the embedded pocket)")
    parser.add_argument(
        "--library", type=Path, default=Path("out"), help="folder of adapters (default: out, as `fusion train`)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets everyone in who can reach this machine")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    chosen = parser.parse_args()
    print("Starting the studio ...", flush=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing calls home

    from app.interface import build, launch_options
    from app.session import Session

    session = Session(chosen.base, chosen.library)
    page = build(session)
    threading.Thread(target=session.warm_up, name="opening", daemon=True).start()
    where = {"server_name": chosen.host, "server_port": chosen.port, "quiet": True, "prevent_thread_lock": True}
    try:
        page.launch(**where, **launch_options())
    except OSError as error:  # the port is taken
        parser.exit(1, f"{error}\n")
    print(f"Open {page.local_url} in a browser. Ctrl-C ends it.", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
