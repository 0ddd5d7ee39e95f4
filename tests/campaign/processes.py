"""Commands in forked children: started, watched and killed."""

import atexit
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Action = Sequence[str] | Callable[[], object]  # the words after `fusion`, or a function
TIMEOUT = 300  # seconds, after which a command hangs
CRASH = 99  # exit code of an exception that no command should let through
LATER = (signal.SIGINT, signal.SIGTERM)  # these wait until the command itself runs
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "fcntl.flock", "shutil.rmtree"}


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit code, or minus a signal's number; `None` is one that had to be stopped."""

    code: int | None
    output: str
    seconds: float

    @property
    def traceback(self) -> bool:
        return self.code == CRASH or "Traceback (most recent call last)" in self.output

    @property
    def last_lines(self) -> str:
        return self.output[-2000:]


class Child:
    """A command in a process of its own, in `folder`; what it prints comes through a pipe that takes a megabyte."""

    def __init__(self, action: Action, folder: Path, prepare: Callable[[], object] | None = None) -> None:
        self.began = time.monotonic()
        self.output, log = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 2**20)
        sys.stdout.flush(), sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, LATER)
        self.pid = os.fork()
        if not self.pid:
            _run(action, folder, log, prepare)
        os.close(log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LATER)

    def wait(self, timeout: float = TIMEOUT) -> Ending:
        """Wait for its end; after `timeout` seconds it is killed."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return Ending(os.waitstatus_to_exitcode(status), self.text(), time.monotonic() - self.began)
            if time.monotonic() - self.began > timeout:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ending(None, self.text(), timeout)
            time.sleep(0.002)

    def kill_after(self, seconds: float, number: signal.Signals) -> Ending:
        """Send a signal at that moment, if it is still running then."""
        while time.monotonic() - self.began < seconds:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return self.wait()
            time.sleep(0.001)
        os.kill(self.pid, number)
        return self.wait()

    def text(self) -> str:
        """What it has printed. It has ended, so nothing more will come."""
        try:
            return os.read(self.output, 2**20).decode(errors="replace")
        except BlockingIOError:  # nothing, and a child of its own may still print
            return ""
        finally:
            os.close(self.output)


def run(action: Action, folder: Path, prepare: Callable[[], object] | None = None, timeout: float = TIMEOUT) -> Ending:
    return Child(action, folder, prepare).wait(timeout)


def _run(action: Action, folder: Path, log: int, prepare: Callable[[], object] | None) -> None:
    code = CRASH
    try:
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()
        if prepare:
            prepare()
        code = 128 + signal.SIGINT  # of a signal that came before the command has begun
        with suppress(KeyboardInterrupt):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, LATER)
            code = CRASH
        if code != CRASH:
            return
        if callable(action):
            code = int(action() or 0)
        else:
            from fusion.cli import main

            code = main(action)
        atexit._run_exitfuncs()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Counter:
    """A number that forked children share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return struct.unpack("q", self._memory[:])[0]

    def add(self) -> int:
        value = self.value + 1
        self._memory[:] = struct.pack("q", value)
        return value


def count_file_events(counter: Counter, kill_at: int = 0, number: signal.Signals = signal.SIGKILL) -> None:
    """In a child: count what it does to files, and send it a signal at event number `kill_at`."""
    fsync = os.fsync

    def event(name: str, arguments: tuple) -> None:
        reads = name == "open" and (not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if name in FILE_EVENTS and not reads and counter.add() == kill_at:
            os.kill(os.getpid(), number)

    def counted_fsync(file: int) -> None:
        fsync(file)
        event("fcntl.flock", ())

    os.fsync = counted_fsync
    sys.addaudithook(event)


def die_when_a_file_reaches(size: int) -> None:
    """In a child: the write that would make any file larger than `size` bytes kills the process, half done."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_file_size(size: int) -> None:
    """In a child: no file can become larger than `size` bytes, as on a disk that is full by then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def obey_permissions() -> None:
    """In a child: give up root's right to write everywhere. Linux's capset(2), version 3, all sets empty."""
    header, data = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if ctypes.CDLL(None).capset(header, data):
        raise OSError("the rights of root cannot be given up")
