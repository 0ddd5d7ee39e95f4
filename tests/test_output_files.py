"""Every output: whole or not at all, leftovers removed, and checked before the work."""

import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from fusion.errors import OutputError
from fusion.output_files import MARK, check_output, output_group, remove_leftovers, write_output

LONG = 300  # characters, more than a name may have


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def visible(folder):
    return [name for name in names(folder) if not name.startswith(".")]


@contextmanager
def files_of_at_most(size):
    """A full disk: writing beyond `size` fails as ENOSPC does, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def killed_while(code, folder):
    """Run `code`, whose `stop()` kills the process as a power cut would."""
    program = f"import os, signal\nfrom fusion.output_files import *\nimport fusion.output_files as module\n{code}"
    stop = "def stop(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
    ended = subprocess.run([sys.executable, "-c", stop + program], cwd=folder, env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_else(tmp_path):
    target = write_output(tmp_path / "new" / "a.bin", b"old")
    with files_of_at_most(1000), pytest.raises(OutputError, match=r"a\.bin' cannot be written: File too large"):
        write_output(target, bytes(10_000))
    assert names(target.parent) == ["a.bin"]
    assert target.read_bytes() == b"old"


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_is_left_alone(tmp_path):
    killed_while("module.os.fsync = stop\nwrite_output('a.bin', b'half')", tmp_path)
    (half,) = names(tmp_path)
    assert half.startswith(".a.bin.")
    with output_group(tmp_path / "b") as group:  # removes that
        assert names(tmp_path) == [group.name]
        write_output(tmp_path / "c.bin", b"whole")
        remove_leftovers(tmp_path)
        (group / "b").write_text("alive")
    assert names(tmp_path) == ["b", "c.bin"]


def test_a_group_appears_whole_or_not_at_all(tmp_path):
    write = "with output_group('model') as group:\n for name in ('model', 'a', 'z'): (group / name).write_text(name)\n"
    killed_while(f"{write} stop()", tmp_path)
    assert visible(tmp_path) == []
    # Killed after the first entry was moved: the next writer moves the others.
    killed_while(f"n = [0]\nmodule._sync = lambda _: None\n{ONE_MOVE}{write}", tmp_path)
    assert visible(tmp_path) == ["a"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a", "model", "z"]
    with pytest.raises(RuntimeError), output_group(tmp_path / "other") as group:
        (group / "other").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a", "model", "z"]


ONE_MOVE = """from pathlib import Path
replace = Path.replace
def replace_once(*paths):
    n[0] += 1
    replace(*paths) if n[0] == 1 else stop()
Path.replace = replace_once
"""


def test_a_group_replaces_folders_as_a_whole(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with output_group(tmp_path / "model") as group:
        (group / "model").mkdir()
        (group / "model" / "new").touch()
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


def test_writers_side_by_side_disturb_nobody(tmp_path):
    def write(number):
        for turn in range(20):
            write_output(tmp_path / f"{number}-{turn}", b"whole")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names(tmp_path)) == 80


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.txt", r"ends in \.png"),
        ("folder.png", "is a folder"),
        ("pipe.png", "is a pipe"),
        ("file/x.png", "is a file, not a folder"),
        (f"{'n' * LONG}.png", "304 bytes is too long"),
        (f"{'n' * LONG}/x.png", "300 bytes is too long"),
        ("/".join(["n" * 200] * 30) + "/x.png", "path is too long"),
        ("nul\0.png", "null"),
        ("link.png", "a broken link"),
        ("other.png", "not made by this program; choose another name, or replace it with --overwrite"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_work(tmp_path, name, reason):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "file").touch()
    (tmp_path / "other.png").write_text("a photograph")
    (tmp_path / "link.png").symlink_to("link.png")
    before = names(tmp_path)
    with pytest.raises(OutputError, match=reason) as caught:
        check_output(tmp_path / name, endings=(".png",))
    assert len(str(caught.value)) < 600
    assert names(tmp_path) == before


def test_a_writer_beside_it_may_delete_a_probe_that_is_no_longer_locked(tmp_path, monkeypatch):
    close = os.close

    def close_and_let_another_begin(descriptor):
        close(descriptor)
        monkeypatch.setattr(os, "close", close)
        remove_leftovers(tmp_path)

    monkeypatch.setattr(os, "close", close_and_let_another_begin)
    assert check_output(tmp_path / "a.png") == tmp_path / "a.png"
    assert os.close is close and not any(tmp_path.iterdir())


def test_homes_room_and_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/new/x") == tmp_path / "new" / "x"
    with pytest.raises(OutputError, match="home"):
        check_output("~nobody-of-this-name/x")
    with pytest.raises(OutputError, match=r"1,000,000,000\.0 MB are needed there"):
        check_output(tmp_path / "x", size=10**15)
    for write in (check_output, write_output):
        with pytest.raises(OutputError, match="is a device"):
            write("/dev/full")
    assert names(tmp_path) == []


def test_ones_own_is_replaced_and_anything_with_overwrite(tmp_path):
    target = write_output(tmp_path / "plot.svg", f"<svg>{MARK}</svg>".encode())
    check_output(target)
    target.write_text("somebody's drawing")
    check_output(target, overwrite=True)
    check_output(target, foreign=lambda _: "")
    with pytest.raises(OutputError, match="it holds <dog>"):
        check_output(target, foreign=lambda _: "it holds <dog>")
