"""A pipeline can do one thing at a time: everyone waits for it in one queue, first come, first served."""

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Waiting(NamedTuple):
    """How many are ahead in the queue, and what the first of them does."""

    ahead: int
    activity: str  # "A picture is being drawn"

    def __str__(self) -> str:
        others = "You are next." if self.ahead == 1 else f"{self.ahead} are before you in the queue."
        return f"{self.activity}. {others}"


class PipelineQueue:
    """A lock, first come, first served. A training asks for it at every step, so that others draw in between."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: list[tuple[object, str]] = []

    @contextmanager
    def acquire(self, activity: str) -> Generator[None]:
        """Wait for the pipeline as long as it takes, and have it for the block."""
        with self.enter(activity) as waiting:
            for _ in waiting:
                pass
            yield

    @contextmanager
    def enter(self, activity: str, interval: float = 0.5) -> Generator[Iterator[Waiting]]:
        """Join the queue. Iterating waits, with a Waiting every `interval` seconds, until the pipeline is free."""
        ticket = object()
        with self._changed:
            self._tickets.append((ticket, activity))
        try:
            yield self._wait(ticket, interval)
        finally:
            with self._changed:
                self._tickets = [entry for entry in self._tickets if entry[0] is not ticket]
                self._changed.notify_all()

    def _wait(self, ticket: object, interval: float) -> Iterator[Waiting]:
        timeout = 0.05  # the first answer comes at once
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tickets[0][0] is ticket, timeout)
                ahead = [other for other, _ in self._tickets].index(ticket)
                activity = self._tickets[0][1]
            if not ahead:
                return
            timeout = interval
            yield Waiting(ahead, activity)
