"""Long work in a thread of its own, whose results are shown as they come, and which ends when nobody watches."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import threading
import time
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any, NamedTuple

from PIL import Image

import fusion
from fusion_studio.session import Session


class StepProgress(NamedTuple):
    """One moment of a drawing: how far it is, and sometimes a preview."""

    step: int
    total: int
    preview: Image.Image | None = None


class Result(NamedTuple):
    """What the work returned."""

    value: Any


class ProgressStream:
    """Where the work shows what it has. Raises Cancelled when nobody watches any more."""

    # Seconds from frame to frame, and from preview to preview, at least: the server sends and the page draws them on
    # the cores that the picture needs.
    PAUSE, PREVIEW_PAUSE = 0.2, 0.5

    def __init__(self) -> None:
        self.frames: Queue[Any] = Queue()
        self.left = threading.Event()
        self._cost, self._last = 0.0, 0.0  # seconds a preview takes; when the latest was ready
        self._shown = 0.0  # when the latest frame was

    def show(self, frame: Any) -> None:
        self.check()
        self.frames.put(frame)

    def check(self) -> None:
        if self.left.is_set():
            raise fusion.Cancelled("Nobody is waiting for this any more.")

    def on_step(self, step: int, total: int, preview: Callable[[], Image.Image]) -> None:
        """For generate: two previews a second, fewer on a slow page or where they take a quarter of the time."""
        began, image = time.monotonic(), None
        if self.frames.empty() and began - self._last >= max(self.PREVIEW_PAUSE, 3 * self._cost):
            image = preview()
            self._last = time.monotonic()
            self._cost = self._last - began
        self.check()
        if image or step == total or began - self._shown >= self.PAUSE:
            self.show(StepProgress(step, total, image))
            self._shown = time.monotonic()


def stream_results(session: Session, clause: str, work: Callable[[ProgressStream], Any]) -> Iterator[Any]:
    """Waiting while others have the pipeline, then what `work` shows, and Done last. Closing the iterator cancels."""
    screen = ProgressStream()

    def run() -> None:
        try:
            screen.frames.put(Result(work(screen)))
        except BaseException as error:  # handed to the one who asked
            screen.frames.put(error)

    with session.queue.enter(clause) as place:
        yield from place
        thread = threading.Thread(target=run, name="drawing", daemon=True)
        thread.start()
        try:
            while True:
                frame = screen.frames.get()
                if isinstance(frame, BaseException):
                    raise frame
                yield frame
                if isinstance(frame, Result):
                    return
        finally:
            screen.left.set()
            thread.join()
