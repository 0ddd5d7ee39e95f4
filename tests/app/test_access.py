"""Whom the studio answers, over HTTP: its own pages and programs of this machine, and nobody else's page."""

import http.client
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from gradio_client import Client

from fusion_studio.access import AllowedHosts, RequestCheck, is_host_name
from fusion_studio.interface import build
from fusion_studio.session import Session
from fusion_studio.temporary_folder import PREFIX, TemporaryFolder
from fusion_studio.theme import launch_options

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow

FORM = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\nstored\r\n--x--\r\n"
)
MULTIPART, JSON = {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Type": "application/json"}
REQUESTS = [
    ("GET", "/", b"", {}),
    ("GET", "/config", b"", {}),
    ("GET", "/theme.css", b"", {}),
    ("GET", "/nowhere", b"", {}),
    ("GET", "/gradio_api/info", b"", {}),
    ("GET", "/gradio_api/queue/data?session_hash=a", b"", {}),
    ("GET", "/gradio_api/heartbeat/a", b"", {}),
    ("GET", "/gradio_api/file=/etc/passwd", b"", {}),
    ("POST", "/gradio_api/upload", FORM, MULTIPART),
    ("POST", "/gradio_api/run/library", b'{"data": ["", ""]}', JSON),
    ("POST", "/gradio_api/call/delete", b'{"data": ["rex"]}', JSON),
    ("POST", "/gradio_api/queue/join", b'{"data": ["", ""], "fn_index": 0, "session_hash": "a"}', JSON),
    ("POST", "/login", b"username=a&password=b", {"Content-Type": "application/x-www-form-urlencoded"}),
    ("OPTIONS", "/gradio_api/upload", b"", {"Access-Control-Request-Method": "POST"}),
]
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "YQ=="}


@pytest.fixture(scope="module")
def served(base, tmp_path_factory):
    session = Session(base, tmp_path_factory.mktemp("library"))
    page = build(session)
    page.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    page.session = session
    yield page
    page.close(verbose=False)
    session.close()


def answer(page, method, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        names = {name.lower() for name, _ in response.getheaders()}
        return response.status, "" if response.status == 200 else response.read().decode(), names
    finally:
        connection.close()


def test_a_page_of_another_origin_or_host_gets_nothing_and_stores_nothing(served):
    port = served.server_port
    foreign = [
        {"Host": f"evil.example:{port}"},  # DNS rebinding: same-origin for the browser
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}", "Sec-Fetch-Site": "same-origin"},
        {"Host": f"127.0.0.1.evil.example:{port}"},
        {"Host": f"192.168.7.7:{port}"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://localhost:{port + 1}", "Sec-Fetch-Site": "same-site"},
        {"Origin": f"http://127.0.0.1:{port}.evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ]
    files = sorted(served.session.folder.rglob("*"))
    for headers in foreign:
        for method, path, body, about in REQUESTS if headers in foreign[::5] else REQUESTS[:9:4]:
            status, text, names = answer(served, method, path, body, {**about, **headers})
            assert status == 403 and "this studio" in text.lower(), (headers, path)
            assert not [name for name in names if name.startswith("access-control")], (headers, path)
    assert answer(served, "GET", "/gradio_api/queue/data", b"", {**UPGRADE, **foreign[0]})[0] in (400, 403)
    assert sorted(served.session.folder.rglob("*")) == files


def test_its_own_pages_links_to_it_and_programs_are_answered(served):
    port = served.server_port
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    own = {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}", "Sec-Fetch-Site": "same-origin"}
    tunnel = {"Origin": "http://localhost:9000", "Host": "localhost:9000"}
    for headers in ({}, link, own, tunnel, {"Host": f"[::1]:{port}"}, {"Host": "LOCALHOST"}):
        assert answer(served, "GET", "/?__theme=dark", b"", headers)[0] == 200, headers
    assert answer(served, "GET", "/config", b"", link)[0] == 403  # a link opens the page, nothing else
    status, _, names = answer(served, "POST", "/gradio_api/upload", FORM, {**MULTIPART, **own})
    assert status == 200 and {"cross-origin-resource-policy", "x-frame-options"} <= names
    assert "is empty" in Client(served.local_url, verbose=False).predict("", "", api_name="/library")[0]
    with urllib.request.urlopen(served.local_url) as response:
        assert response.status == 200


FRAME = {"site": b"cross-site", "mode": b"navigate", "dest": b"iframe"}


def test_a_site_that_is_allowed_may_show_the_page_in_a_frame_and_nothing_else():
    frame = [(f"sec-fetch-{part}".encode(), value) for part, value in FRAME.items()]

    def refusal(frames, path="/", origin=()):
        headers = [(b"host", b"localhost"), *frame, *origin]
        return RequestCheck(None, AllowedHosts(frames=frames)).refusal(
            {"type": "http", "method": "GET", "path": path, "headers": headers}
        )

    assert refusal([]) and not refusal(["huggingface.co"])
    assert refusal(["huggingface.co"], "/config")
    assert refusal(["huggingface.co"], origin=[(b"origin", b"https://huggingface.co")])
    assert (b"x-frame-options", b"SAMEORIGIN") in AllowedHosts().headers()
    assert (b"content-security-policy", b"frame-ancestors 'self' https://huggingface.co") in AllowedHosts(
        frames=["HuggingFace.co"]
    ).headers()


def test_hosts_are_allowed_by_name():
    own, everywhere = socket.gethostname(), AllowedHosts("0.0.0.0", ["Studio.example.org"])
    for host in ("10.1.2.3:7860", "[fe80::1]:7860", own, f"{own.upper()}:7860", "localhost", "studio.example.org."):
        assert everywhere.accepts(host), host
    for host in ("evil.example", "10.1.2.3.evil.example", "a@localhost", "localhost:x", "local host", "[::1", "", "٣"):
        assert not everywhere.accepts(host), host
    assert not AllowedHosts().accepts("10.1.2.3") and AllowedHosts("10.1.2.3").accepts("10.1.2.3:80")
    assert not AllowedHosts("10.1.2.3").accepts("10.1.2.4")
    proxied = ("https://studio.example.org", "127.0.0.1:7860")  # a proxy may rewrite Host, never Origin
    assert everywhere.is_own(*proxied) and not AllowedHosts("0.0.0.0").is_own(*proxied)
    assert everywhere.is_own("https://10.1.2.3", "10.1.2.3") and not everywhere.is_own("http://10.1.2.3", "10.1.2.3:81")
    assert is_host_name("studio.example.org") and is_host_name("[::1]")
    assert not any(map(is_host_name, ("https://studio.example.org", "studio:80", "a/b", "", "*")))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_temporary_folder_is_private_and_only_dead_ones_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os; from fusion_studio.temporary_folder import TemporaryFolder as F; f = F().path; (f / 'a').touch()"
    words = [sys.executable, "-c", f"{code}; print(f, flush=True); os.kill(os.getpid(), 9)"]
    killed = subprocess.run(words, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert (left / "a").is_file() and mode(left) == 0o700
    living = TemporaryFolder()
    (tmp_path / f"{PREFIX}file").write_text("no folder")
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path)
    assert not left.exists() and mode(living.path) == 0o700
    another = TemporaryFolder()
    assert living.path.is_dir() and another.path.is_dir() and len(list(tmp_path.iterdir())) == 4
    another.remove(), another.remove()
    assert living.path.is_dir() and not another.path.exists()
    living.remove()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_nothing_is_left_behind_when_it_is_ended(number, base, tmp_path):
    words = [sys.executable, "-m", "fusion_studio", "--base", base, "--library", "out", "--allowed-host", "a.example"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'app'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    studio = subprocess.Popen(words, cwd=tmp_path, env=environment, **pipes)
    try:
        url = next(line.split()[1] for line in studio.stdout if line.startswith("Open "))
        (folder,) = tmp_path.glob(f"{PREFIX}*")
        request = urllib.request.Request(f"{url}gradio_api/upload", FORM, MULTIPART | {"Host": "a.example"})
        with urllib.request.urlopen(request) as response:
            (upload,) = tmp_path.rglob("a.png")
            assert response.status == 200 and folder in upload.parents and mode(folder) == 0o700
        while studio.poll() is None:  # whoever is impatient sends it again while the studio cleans up
            studio.send_signal(number)
            time.sleep(0.002)
        assert studio.returncode == (143 if number == signal.SIGTERM else 0)
        assert "Traceback" not in studio.stdout.read()
    finally:
        studio.kill()
        studio.stdout.close()
    assert list(tmp_path.glob(f"{PREFIX}*")) == []
