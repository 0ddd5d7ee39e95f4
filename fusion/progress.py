"""Units of work of calls that may take long: a program listens to them, and no argument is passed through."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

OnProgress = Callable[[int, int], None]  # units done, units in all
OnPhase = Callable[[str, int, int], None]  # phase, units done, units in all
T = TypeVar("T")
_listener: ContextVar[OnPhase | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: OnPhase) -> Generator[None]:
    """For the block, `listener(phase, done, total)` is called before each unit of `units`, and after the last."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def reporter(phase: str) -> OnProgress:
    """A function that reports units of a phase to the listener, if there is one."""
    listener = _listener.get()
    return partial(listener, phase) if listener else lambda _done, _total: None


def units(phase: str, items: Sequence[T]) -> Generator[T]:
    """The items, one by one, each of them a unit of the phase."""
    report = reporter(phase)
    for number, item in enumerate(items):
        report(number, len(items))
        yield item
    report(len(items), len(items))
