"""The bar of commands that take a while, and lines that say how long their phases take."""

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from fusion.progress import OnPhase, listening

MIN_ESTIMATE = 10  # seconds of work that are announced with a line
MAX_SILENCE = 2  # seconds of a phase, or its first unit, until that line


@contextmanager
def progress(delay: float = 1e-9) -> Generator[Callable[..., None]]:
    """Gives `advance(done, total, note="")`, also good as an `on_step` of generate.

    Until `delay` seconds after the first call nothing is shown.

    The bar is seldom redrawn in files and pipes. Its clock starts with the first call, and anew where the total is
    another or less is done than before: what went on until then says nothing about the time left.
    """
    from tqdm import tqdm

    shape = "{percentage:3.0f}% {bar:30} {n}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    options: dict[str, Any] = {"mininterval": 0.1 if sys.stderr.isatty() else 60, "bar_format": shape, "delay": delay}
    bar: tqdm[Any] | None = None

    def advance(done: int, total: int, _preview: object = None, *, note: str = "") -> None:
        nonlocal bar
        if bar is None or bar.total != total or done < bar.n:
            if bar is not None:
                bar.close()
            bar = tqdm(total=total, initial=done, leave=False, unit=" steps", **options)
        at_once = delay < MAX_SILENCE  # a refresh does not wait for the delay
        bar.set_postfix_str(note, refresh=at_once and sys.stderr.isatty() and bar.n == bar.initial)
        bar.update(done - bar.n)
        if at_once and note and done == total:  # no step follows that would show it
            bar.refresh()

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def showing_units() -> Generator[None]:
    """Show the phases of `fusion.progress` that take more than a moment: a bar each, and a line on stderr."""
    show: OnPhase | None = None
    with ExitStack() as bar:

        def report(phase: str, done: int, total: int) -> None:
            nonlocal show
            if show is None or not done:
                bar.close()
                show = show_phases(bar.enter_context(progress(MAX_SILENCE)), sys.stderr)
            show(phase, done, total)
            if done == total:
                bar.close()
                show = None

        with listening(report):
            yield


def show_phases(advance: Callable[..., None], file: TextIO | None = None) -> OnPhase:
    """An `on_progress` of train: the bar, and one line for each phase of more than a few seconds, which says how long
    one of its units takes, and all of them, in `file` (default: stdout).
    """
    phase, first, began, announced = "", 0, 0.0, False

    def show(now: str, done: int, total: int) -> None:
        nonlocal phase, first, began, announced
        seconds = time.monotonic() - began
        if now != phase or done <= first:  # the same phase may come again, as that of previews
            phase, first, began, announced = now, done, time.monotonic(), False
        elif not announced and seconds > MAX_SILENCE:
            print_estimate(now, seconds / (done - first), total - done, file)
            announced = True
        advance(done, total, note=now)

    return show


def print_estimate(what: str, seconds: float, count: int, file: TextIO | None = None) -> None:
    """Print how long a unit of work takes, if all that are left take a while."""
    from tqdm import tqdm

    if seconds * count > MIN_ESTIMATE:
        left = tqdm.format_interval(seconds * count)
        tqdm.write(f"{what}: {seconds:.1f} s each, {count} more in about {left}", file=file or sys.stdout)
        (file or sys.stdout).flush()


def with_progress(steps: Iterable[Any], advance: Callable[..., None]) -> Generator[Any]:
    """The steps of a training or a distillation, each shown on the bar of `progress` with the mean of recent losses."""
    losses, first = deque[float](maxlen=25), None
    for step in steps:
        if first is None:
            first = step
            if step.resumed:
                print(f"resumed after step {step.resumed} of {step.total}", flush=True)
        elif step.step == first.step + 1:
            print_estimate("steps", step.seconds - first.seconds, step.total - step.step)
        losses.append(step.loss)
        advance(step.step, step.total, note=f"loss {sum(losses) / len(losses):.4f}")
        yield step
