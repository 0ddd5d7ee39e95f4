"""Fair timing on a shared machine: the alternatives run in turns, in another order every round."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """The fastest run, which was disturbed least."""
        return min(self.seconds)

    @property
    def most(self) -> float:
        return max(self.seconds)

    def milliseconds(self) -> list[str]:
        """Median, least and most, as cells of a table."""
        return [f"{1000 * value:.1f} ms" for value in (self.median, self.least, self.most)]


def interleaved(work: Mapping[str, Callable[[], float]], rounds: int, log: Callable[[str], None]) -> dict[str, Timing]:
    """Run every task once a round, and once before to warm up; a task returns the seconds it took."""
    names, seconds = list(work), {name: [] for name in work}
    for number in range(rounds + 1):
        gc.collect()
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            duration = work[name]()
            if number:
                seconds[name].append(duration)
        log(f"round {number} of {rounds}, load {os.getloadavg()[0]:.1f}")
    return {name: Timing(tuple(runs)) for name, runs in seconds.items()}


def timed(call: Callable[[], object]) -> float:
    """Seconds `call` takes, with what it started on a GPU, and without a garbage collection in between."""
    gc.disable()
    try:
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def repeated(call: Callable[[], object], rounds: int) -> Timing:
    """`call` alone, several times, and once before to warm up."""
    call()
    gc.collect()
    return Timing(tuple(timed(call) for _ in range(rounds)))


def paired(one: Timing, other: Timing) -> float:
    """Median over rounds of one / other: runs of the same round share the load of the machine."""
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))
