"""Long work in a thread of its own: its results are shown as they come, and it is cancelled when the page is left."""

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
    """How far a drawing is, and sometimes a preview."""

    step: int
    total: int
    preview: Image.Image | None = None


class Result(NamedTuple):
    """What the work returned."""

    value: Any


class ProgressStream:
    """Takes what the work has to show. Raises Cancelled once the page is left."""

    # Seconds between two updates, and between two previews, at least: the server sends and the page draws them on the
    # cores that the picture needs.
    INTERVAL, PREVIEW_INTERVAL = 0.2, 0.5

    def __init__(self) -> None:
        self.updates: Queue[Any] = Queue()
        self.cancelled = threading.Event()
        self._preview_cost, self._last_preview, self._last_update = 0.0, 0.0, 0.0  # seconds, and two points in time

    def send(self, update: Any) -> None:
        self._check()
        self.updates.put(update)

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise fusion.Cancelled("Nobody is waiting for this any more.")

    def on_step(self, step: int, total: int, preview: Callable[[], Image.Image]) -> None:
        """For generate: two previews a second, fewer on a slow page or where they take a quarter of the time."""
        start, image = time.monotonic(), None
        if self.updates.empty() and start - self._last_preview >= max(self.PREVIEW_INTERVAL, 3 * self._preview_cost):
            image = preview()
            self._last_preview = time.monotonic()
            self._preview_cost = self._last_preview - start
        self._check()
        if image or step == total or start - self._last_update >= self.INTERVAL:
            self.send(StepProgress(step, total, image))
            self._last_update = time.monotonic()


def stream_results(session: Session, activity: str, work: Callable[[ProgressStream], Any]) -> Iterator[Any]:
    """Waiting while others have the pipeline, then what `work` sends, and Result last. Closing the iterator cancels."""
    stream = ProgressStream()

    def run() -> None:
        try:
            with session.without_training():
                result = work(stream)
            stream.updates.put(Result(result))
        except BaseException as error:  # raised again in the thread that reads
            stream.updates.put(error)

    with session.queue.enter(activity) as waiting:
        yield from waiting
        thread = threading.Thread(target=run, name="drawing", daemon=True)
        thread.start()
        try:
            while True:
                update = stream.updates.get()
                if isinstance(update, BaseException):
                    raise update
                yield update
                if isinstance(update, Result):
                    return
        finally:
            stream.cancelled.set()
            thread.join()
