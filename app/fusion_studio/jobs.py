"""Work of minutes or hours, one job after the other, in a thread of its own, whether or not a page is open.

A job asks for the pipeline anew at every step, so that others draw in between.
"""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import threading
from collections import deque
from pathlib import Path
from typing import Any, TypeVar

from fusion_studio.session import Session

MAX_FINISHED = 20  # jobs that are over and still shown
PACE_STEPS = 40  # that the time left is estimated from
CLOSING_TIME = 8  # seconds for the step under way when the studio ends; Docker kills after ten


class Job:
    """Something to be learned, being learned, or done. Written by one thread, read by many."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title  # the token, or the tokens
        self.start, self.step, self.total, self.seconds = 0, 0, total, 0.0
        self.losses: list[float] = []
        self._pace = deque[tuple[int, float]](maxlen=PACE_STEPS)  # the latest steps, and the seconds at their ends
        self.state, self.error = "waiting", ""  # then preparing, learning, and learned, stopped or failed
        self.stop, self.unpaused = threading.Event(), threading.Event()  # `stop` ends it after its step
        self.unpaused.set()
        self.saved: Path | None = None

    @property
    def activity(self) -> str:
        """What others read while they wait for the pipeline."""
        return f"{self.title} is being taught"

    @property
    def active(self) -> bool:
        return self.state in ("preparing", "learning")

    @property
    def paused(self) -> bool:
        return not self.unpaused.is_set()

    def record(self, last: Any) -> None:
        """A TrainStep or DistillationStep that was done."""
        self.state, self.step, self.total, self.seconds = "learning", last.step, last.total, last.seconds
        self.start = last.resumed
        self.losses.append(last.loss)
        self._pace.append((last.step, last.seconds))

    @property
    def time_left(self) -> float | None:
        """Seconds until the last step, at the pace of the latest; None before there is one."""
        (first, began), (latest, now) = (self._pace or [(0, 0.0)])[0], (self._pace or [(0, 0.0)])[-1]
        return None if latest == first else (now - began) / (latest - first) * (self.total - latest)

    @property
    def finished(self) -> bool:
        return self.step == self.total

    def run(self, session: Session) -> None:
        """Learn to the end, or until `stop` is set."""
        raise NotImplementedError

    def release(self, state: str) -> None:
        """Give back what the job holds; `state` is the one that it will be in."""


Kind = TypeVar("Kind", bound=Job)


class JobQueue:
    """The jobs of a session."""

    def __init__(self, session: Session) -> None:
        self.session, self.jobs = session, list[Job]()
        self.changed = threading.Event()
        self._closed = False
        self._lock, self._thread = threading.Lock(), None

    @property
    def unfinished(self) -> list[Job]:
        """Those under way or waiting."""
        return [job for job in self.jobs if job.active or job.state == "waiting"]

    def of(self, kind: type[Kind]) -> list[Kind]:
        """All jobs of a kind."""
        return [job for job in self.jobs if isinstance(job, kind)]

    def add(self, job: Job) -> None:
        with self._lock:
            over = [job for job in self.jobs if job not in self.unfinished][:-MAX_FINISHED]
            self.jobs = [*(job for job in self.jobs if job not in over), job]
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="teaching", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End the job under way after its step; it and those that wait can be resumed by the next studio."""
        with self._lock:
            self._closed, thread = True, self._thread
            for job in self.jobs:
                job.stop.set()
        if thread is not None:
            thread.join(CLOSING_TIME)

    def _run(self) -> None:
        while True:
            with self._lock:
                job = next((job for job in self.jobs if job.state == "waiting"), None)
                if job is None or self._closed:
                    self._thread = None
                    return
                job.state = "preparing"
            state = "failed"
            try:
                job.run(self.session)
                state = "learned" if job.finished else "stopped"
            except Exception as error:
                job.error = self.session.error_sentence(error)
            finally:
                job.release(state)
                job.state = state
                self.changed.set()
