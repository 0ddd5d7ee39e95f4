"""The studio as a program: started, taught, killed and started again; and four clients at once on one page."""

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from campaign import laws, materials, processes
from campaign.processes import Child

TOKEN = "<dog>"
ENDING = "The studio is ending; do this again once it is running."
SETTINGS = {"max_train_steps": "6", "targets": "unet.attn2.to_k", "text_encoder_lr": "0", "validation_steps": "3"}


def serve(base: Path, work: Callable[[object], bool], port: int | None = None) -> None:
    """The whole program in this process, on the library `out`. `work` gets its session; once it is done, as it says by
    returning True, the program ends as by Ctrl+C."""
    from fusion_studio import __main__ as program
    from fusion_studio.session import Session

    def work_and_leave(session: Session) -> None:
        try:
            if work(session):
                os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:
            if session.error_sentence(error) == ENDING:  # its files are deleted while it works
                return
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(processes.CRASH)

    Session.warm_up = work_and_leave
    sys.argv = ["studio", "--base", str(base), "--library", "out", *(["--port", str(port)] if port else [])]
    program.main()


def teach(base: Path) -> None:
    serve(base, _teach)


def resume(base: Path) -> None:
    """What a person does who finds the studio ended: resume what is unfinished, else teach what is not there."""
    serve(base, _resume)


def _teach(session: object) -> bool:
    from fusion_studio.tabs import teach as tab

    uploads = Path(laws.TEMPORARY, "uploads")
    shutil.copytree("data", uploads, dirs_exist_ok=True)
    _, pictures, _ = tab.add_pictures(session, [str(path) for path in sorted(uploads.iterdir())])
    shutil.rmtree(uploads, ignore_errors=True)
    tab.teach_concept(session, pictures, TOKEN, "dog", "standard", {"filled": SETTINGS})
    return _learned(session)


def _resume(session: object) -> bool:
    from fusion_studio import training_jobs
    from fusion_studio.tabs import teach as tab

    shutil.rmtree(Path(laws.TEMPORARY, "uploads"), ignore_errors=True)
    unfinished = list(training_jobs.unfinished_jobs(session))
    if unfinished:
        tab.resume_teaching(session, unfinished[0])
        return _learned(session)
    return "dog" in session.entries() or _teach(session)


def _learned(session: object) -> bool:
    """Wait for the end of the training. Not learned is one that was stopped because the studio is ending."""
    while any(job.state in ("waiting", "preparing", "learning") for job in session.jobs.jobs):
        time.sleep(0.01)
    (job,) = session.jobs.jobs
    assert job.state in ("learned", "stopped"), f"{job.state}: {job.error}"
    return job.state == "learned"


def four_clients(folder: Path) -> list[str]:
    """Four clients on one page: all send the same picture, then each does something else; nobody disturbs another."""
    work, base = laws.fresh(folder / "clients", folder / "data"), folder / materials.BASE
    shutil.copytree(folder / "lib", work / "out")
    port = free_port()
    page = Child(partial(serve, base, wait_for(work / "done"), port), work)
    address = f"http://127.0.0.1:{port}/"
    clients = [Child(partial(client, address, work), work) for client in (_draws, _teaches, _tidies_up, _compares)]
    problems = []
    for child in clients:
        ending = child.wait(240)
        problems += [f"a client: {ending.last_lines}"] if ending.code else []
    (work / "done").touch()
    ending = page.wait(60)
    problems += [f"the studio: {ending.code} {ending.last_lines}"] if ending.code or ending.traceback else []
    left = {path.stem for path in (work / "out").glob("*.safetensors")}
    problems += [] if left == {"tom", "dog", "max"} else [f"the library has {sorted(left)}"]
    return problems + [f"{name} is left over" for name in laws.hidden_files(work)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(file: Path) -> Callable[[object], bool]:
    def wait(session: object) -> bool:
        while not file.exists():
            time.sleep(0.05)
        return True

    return wait


def _client(address: str, work: Path) -> tuple[object, list[dict]]:
    """A client that has sent the pictures."""
    from gradio_client import Client, handle_file

    end = time.monotonic() + 120
    while True:
        try:
            client = Client(address, verbose=False)
            break
        except Exception:  # not started yet
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    files = [handle_file(str(path)) for path in sorted((work / "data").iterdir())]
    _, pictures, _ = client.predict(files, [], api_name="/pictures")
    assert len(pictures) == 3 and all(picture["crop"] for picture in pictures), pictures
    return client, pictures


def _draw(client: object, prompt: str, picks: dict) -> bytes:
    settings = (5, False, 2, 2.5, 1, "")
    values = ({"picked": picks}, prompt, "", *settings, {"regions": []}, True, "", 0.6)
    stage, *_ = client.predict(*values, api_name="/draw")
    return Path(stage).read_bytes()


def _draws(address: str, work: Path) -> None:
    client, _ = _client(address, work)
    pictures = {_draw(client, "a <tom>", {"tom": 1}) for _ in range(6)}
    assert len(pictures) == 1, "the same recipe gives different pictures"


def _teaches(address: str, work: Path) -> None:
    client, pictures = _client(address, work)
    client.predict(pictures, "dog", "dog", "standard", {"filled": SETTINGS}, "", api_name="/teach")
    progress, *_ = client.submit(api_name="/watch").result(timeout=200)
    assert "Learned in 6 steps" in progress, progress


def _tidies_up(address: str, work: Path) -> None:
    from gradio_client import handle_file

    client, _ = _client(address, work)
    for _ in range(4):
        client.predict(handle_file(str(work / "out" / "tom.safetensors")), api_name="/import")
        client.predict("tom-2", api_name="/delete")
        client.predict("", "", api_name="/library")
    client.predict("rex", "max", api_name="/rename")


def _compares(address: str, work: Path) -> None:
    client, _ = _client(address, work)
    picks = {"picked": {"tom": 1}}
    grid, *_ = client.predict(picks, "a <tom>", "1", ["direct_sum"], False, 0, api_name="/compare")
    assert "kept" in grid, grid
    _, exported, *_ = (None, *client.predict(picks, "direct_sum", "", "kohya", 0, api_name="/export"))
    assert "tom_kohya.safetensors" in str(exported), exported
