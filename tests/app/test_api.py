"""The published API over HTTP, and what the server refuses."""

import threading
import time
import urllib.error
import urllib.request

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from app.interface import build, launch_options

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The copy keyword is deprecated")]  # gradio's pandas


@pytest.fixture
def served(session):
    page = build(session)
    page.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield page
    page.close()


@pytest.fixture
def client(served):
    return Client(served.local_url, verbose=False)


def upload(pictures):
    return [{"image": handle_file(path), "caption": None} for path, _ in pictures]


def test_teach_look_and_draw(client, session, pictures):
    progress, *_ = client.predict(upload(pictures), "rex", "dog", 2, "additive", 0, api_name="/teach")
    assert "Learned in 2 steps" in progress
    picks, cards = client.predict([], api_name="/library")
    assert [tuple(choice) for choice in picks["choices"]] == [("<rex>", "rex")]
    assert "&lt;rex&gt;" in cards
    job = client.submit(["rex"], {}, "a <rex>", "", 3, False, 3, 2.5, 1, api_name="/draw")
    stage, caption, _ = job.result(timeout=60)
    assert stage.endswith(".png") and "seed 3" in caption and len(job.outputs()) > 2
    file = client.predict(["rex"], {"rex": 0.5}, api_name="/fuse")
    assert "rex.safetensors" in str(file)


def test_stop_ends_a_training(client, session, pictures):
    job = client.submit(upload(pictures), "rex", "dog", 5000, "additive", 0, api_name="/teach")
    until = time.monotonic() + 60
    while (session.teaching is None or session.teaching.step < 2) and time.monotonic() < until:
        time.sleep(0.05)
    client.predict(api_name="/stop_teaching")
    progress, *_ = job.result(timeout=60)
    assert "Stopped after" in progress and "rex" in session.entries()


def test_a_cancelled_drawing_gives_the_pipeline_back(client, session):
    job = client.submit([], {}, "a dog", "", 0, False, 100, 2.5, 8, api_name="/draw")
    until = time.monotonic() + 60
    while len(job.outputs()) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    job.cancel()
    stage, *_ = client.predict([], {}, "a dog", "", 0, False, 2, 2.5, 1, api_name="/draw")
    assert stage.endswith(".png")
    assert not [thread for thread in threading.enumerate() if thread.name == "drawing"]


def test_errors_are_sentences(client):
    with pytest.raises(AppError, match="Write a prompt first"):
        client.predict([], {}, " ", "", 0, False, 2, 2.5, 1, api_name="/draw")
    with pytest.raises(AppError, match="/nowhere"):
        client.predict("/nowhere", api_name="/base")


def test_only_meant_endpoints_are_published(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert named.keys() == {"/draw", "/fuse", "/teach", "/stop_teaching", "/base", "/library"}


def test_no_file_of_the_machine_is_served(served, session, tmp_path):
    (tmp_path / "private.txt").write_text("private")
    for path in ("/etc/passwd", str(tmp_path / "private.txt"), str(session.library / "rex.safetensors")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{served.local_url}gradio_api/file={path}")
        assert caught.value.code in (403, 404)
        caught.value.close()
    assert served.run_history is False
