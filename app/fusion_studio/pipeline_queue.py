"""Whose turn it is: a pipeline can do one thing at a time, and everyone waits in one line for it."""

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Waiting(NamedTuple):
    """Not one's turn yet: how many are ahead, and what the first of them does."""

    ahead: int
    clause: str  # "A picture is being drawn"

    def __str__(self) -> str:
        others = "You are next." if self.ahead == 1 else f"{self.ahead} are before you in the line."
        return f"{self.clause}. {others}"


class PipelineQueue:
    """First come, first served. A training joins anew for every step, so that others get their turn in between."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: list[tuple[object, str]] = []

    @contextmanager
    def acquire(self, clause: str) -> Generator[None]:
        """Wait for one's turn, as long as it takes, and have it."""
        with self.enter(clause) as place:
            for _ in place:
                pass
            yield

    @contextmanager
    def enter(self, clause: str, every: float = 0.5) -> Generator[Iterator[Waiting]]:
        """A place in the line. Iterating it waits, telling each time how long the line is, until it is one's turn."""
        ticket = object()
        with self._changed:
            self._tickets.append((ticket, clause))
        try:
            yield self._waiting(ticket, every)
        finally:
            with self._changed:
                self._tickets = [entry for entry in self._tickets if entry[0] is not ticket]
                self._changed.notify_all()

    def _waiting(self, ticket: object, every: float) -> Iterator[Waiting]:
        first = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tickets[0][0] is ticket, timeout=0.05 if first else every)
                ahead = [own for own, _ in self._tickets].index(ticket)
                clause = self._tickets[0][1]
            if not ahead:
                return
            first = False
            yield Waiting(ahead, clause)
