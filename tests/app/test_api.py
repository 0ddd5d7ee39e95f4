"""The published API over HTTP: what it does, what two at once see, and what the server refuses."""

import pickle
import shutil
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import pytest
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from fusion_studio.interface import build
from fusion_studio.theme import launch_options
from fusion_studio.training_jobs import current_training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The copy keyword is deprecated")]  # gradio's pandas

REX = {"picked": {"rex": 1}}


@pytest.fixture
def served(session):
    page = build(session)
    page.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield page
    page.close()


@pytest.fixture
def client(served):
    return Client(served.local_url, verbose=False)


def teach(client, files, token="rex", steps=2):
    _, pictures, _ = client.predict([handle_file(path) for path in files], [], api_name="/pictures")
    settings = {"filled": {"max_train_steps": str(steps)}}
    client.predict(pictures, token, "dog", "standard", settings, "", api_name="/teach")
    return client.submit(api_name="/watch")


def draw(client, prompt, *, seed=0, steps=2, count=1, start="", picks=None):
    settings = (seed, False, steps, 2.5, count, "")
    values = (picks or {"picked": {}}, prompt, "", *settings, {"regions": []}, True, start, 0.6)
    return client.submit(*values, api_name="/draw")


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "this took more than a minute"
        time.sleep(0.05)


def test_teach_draw_compare_and_take_along(client, session, files):
    assert "Learned in 2 steps" in teach(client, files).result(timeout=60)[0]
    cards, slices = client.predict("", "", api_name="/library")
    assert "&lt;rex&gt;" in cards and "directions are free" in slices
    job = draw(client, "a <rex>", seed=3, steps=3, picks=REX)
    stage, caption, cli = job.result(timeout=60)
    assert stage.endswith(".png") and "seed 3" in caption and len(job.outputs()) > 2 and "--seed 3" in str(cli)
    said, cli = client.predict(REX, "direct_sum", "pets", api_name="/fuse")
    assert "pets" in said and "pets" in session.entries() and "fusion fuse" in str(cli)
    exported, _, _ = client.predict(REX, "direct_sum", "", "kohya", 0, api_name="/export")
    assert "rex_kohya.safetensors" in str(exported)
    grid, _, sheet, _ = client.predict(REX, "a <rex>", "1", ["direct_sum"], False, 0, api_name="/compare")
    assert "kept" in grid and "comparison" in str(sheet)
    client.predict("pets", api_name="/delete")
    assert session.entries().keys() == {"rex"}


def test_stop_ends_a_training(client, session, files):
    job = teach(client, files, steps=5000)
    until(lambda: current_training(session) and current_training(session).step >= 2)
    client.predict(api_name="/pause_teaching"), client.predict(api_name="/pause_teaching")
    client.predict(api_name="/stop_teaching")
    progress, *_ = job.result(timeout=60)
    assert "Stopped after" in progress and "rex" in session.entries()


def test_a_cancelled_drawing_gives_the_pipeline_back(client, session):
    job = draw(client, "a dog", steps=100, count=8)
    until(lambda: len(job.outputs()) >= 3)
    job.cancel()
    assert draw(client, "a dog").result(timeout=60)[0].endswith(".png")
    assert not [thread for thread in threading.enumerate() if thread.name == "drawing"]


def test_two_at_once_do_not_disturb_each_other(served, session, files):
    anna, bert = (Client(served.local_url, verbose=False) for _ in range(2))
    alone = draw(bert, "a dog", seed=5).result(timeout=60)[0]
    long = draw(anna, "a cat", steps=60, count=4)
    until(lambda: len(long.outputs()) >= 3)
    short = draw(bert, "a dog", seed=5)
    until(lambda: any("You are next" in output[1] for output in short.outputs()))
    assert not long.done()
    assert Path(short.result(timeout=60)[0]).read_bytes() == Path(alone).read_bytes()
    assert long.result(timeout=60)[0].endswith(".png")  # the first came first, whole
    watching = teach(anna, files, steps=5000)
    until(lambda: current_training(session) and current_training(session).step >= 2)
    meanwhile = draw(bert, "a dog", seed=5).result(timeout=60)[0]  # while a concept is being taught
    assert Path(meanwhile).read_bytes() == Path(alone).read_bytes()
    assert not watching.done()
    bert.predict(api_name="/stop_teaching")
    assert "Stopped" in watching.result(timeout=60)[0]


def huge_png(path, side):
    """A PNG of side x side pixels, all white, without ever having it in memory."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), []
    row = b"\x00" + b"\xff" * (side // 8)
    for _ in range(side):
        rows.append(packer.compress(row))
    data = b"".join(rows) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return str(path)


def test_hostile_files_are_named_and_the_app_goes_on(client, session, files, tmp_path):
    huge = huge_png(tmp_path / "huge.png", 30_000)
    (tmp_path / "text.png").write_text("not a picture")
    evil = tmp_path / "..%2f..%2fx.png"
    shutil.copy(files[0], evil)
    hostile = [huge, str(tmp_path / "text.png"), str(evil)]
    _, pictures, _ = client.predict([handle_file(path) for path in [*hostile, *files]], [], api_name="/pictures")
    notes = [" ".join(picture["notes"]) for picture in pictures]
    assert "megapixels" in notes[0] and "is no PNG" in notes[1] and [bool(p["crop"]) for p in pictures[:3]] == [0, 0, 1]
    assert {path.parent for path in session.uploads.iterdir()} == {session.uploads}
    assert Path(get_upload_folder()).is_relative_to(session.folder)  # private, and deleted with it
    with pytest.raises(AppError, match="megapixels"):
        client.predict(handle_file(huge), api_name="/start_picture")
    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(AppError, match=r"weights.safetensors&#x27; is a Python pickle"):
        client.predict(handle_file(str(tmp_path / "weights.safetensors")), api_name="/import")
    with pytest.raises(AppError, match="Invalid file type"):
        client.predict(handle_file(str(tmp_path / "weights.safetensors")), api_name="/start_picture")
    with pytest.raises(AppError, match="no longer here"):
        draw(client, "a dog", start="../../etc/passwd").result(timeout=60)
    with pytest.raises(AppError, match="has no adapter"):
        client.predict("../../x", api_name="/delete")
    assert session.entries() == {}
    assert draw(client, "a dog").result(timeout=60)[0].endswith(".png")


def test_people_with_the_same_picture_do_not_meet(served, session, files, tmp_path):
    twin = shutil.copy(files[0], tmp_path / Path(files[0]).name)
    answers = list[Any]()

    def drop():
        client = Client(served.local_url, verbose=False)
        for _ in range(2):  # one file twice in a drop
            both = [handle_file(files[0]), handle_file(twin)]
            answers.append(client.predict(both, [], api_name="/pictures")[1])
            answers.append(client.predict(handle_file(twin), api_name="/start_picture"))

    people = [threading.Thread(target=drop) for _ in range(3)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert len(answers) == 12
    ids = [picture["id"] for pictures in answers if isinstance(pictures, list) for picture in pictures]
    assert len({*ids}) == 12 and all(session.upload_path(name).is_file() for name in ids)


def test_errors_are_sentences(client):
    with pytest.raises(AppError, match="Write a prompt first"):
        draw(client, " ").result(timeout=60)
    with pytest.raises(AppError, match="/nowhere"):
        client.predict("/nowhere", api_name="/base")


def test_only_meant_endpoints_are_published(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    teaching = {"/pictures", "/teach", "/watch", "/pause_teaching", "/stop_teaching"}
    teaching |= {"/one_lora", "/watch_one_lora", "/stop_one_lora"}
    using = {"/start_picture", "/draw", "/compare", "/fuse", "/export", "/bake", "/base", "/bind"}
    assert named.keys() == {*teaching, *using, "/library", "/rename", "/delete", "/import"}


def test_no_file_of_the_machine_is_served(served, session, tmp_path):
    (tmp_path / "private.txt").write_text("private")
    for path in ("/etc/passwd", str(tmp_path / "private.txt"), str(session.library / "rex.safetensors")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{served.local_url}gradio_api/file={path}")
        assert caught.value.code in (403, 404)
        caught.value.close()
    assert served.run_history is False


def test_a_password_is_asked_for_where_one_is_set(session):
    page = build(session)
    page.launch(prevent_thread_lock=True, quiet=True, auth=[("anna", "secret")], **launch_options())
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page.local_url}config")
        assert caught.value.code == 401
        caught.value.close()
        known = Client(page.local_url, auth=("anna", "secret"), verbose=False)
        assert draw(known, "a dog").result(timeout=60)[0].endswith(".png")
    finally:
        page.close()
