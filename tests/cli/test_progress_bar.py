"""Lines that say how long a phase takes."""

import pytest

from fusion.cli import progress_bar
from fusion.progress import reporter, units


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


def test_a_long_phase_is_announced_once_and_may_come_again(clock, capsys):
    calls = []
    show = progress_bar.show_phases(lambda done, total, note="": calls.append((done, total, note)))
    for _ in range(2):  # the previews of two steps
        for done in range(1, 5):
            clock[0] += 3
            show("drawing previews", done, 40)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["drawing previews: 3.0 s each, 38 more in about 01:54"] * 2
    assert calls == [(done, 40, "drawing previews") for done in (1, 2, 3, 4)] * 2


def test_short_phases_and_short_rests_are_not_announced(clock, capsys):
    show = progress_bar.show_phases(lambda *_, **__: None)
    for done in range(5):
        clock[0] += 1
        show("encoding", done, 5)
    for done in range(3):
        clock[0] += 4
        show("reading", done, 3)
    assert capsys.readouterr().out == ""


def test_units_of_long_calls_are_shown_to_who_listens(clock, capsys):
    assert list(units("comparing layers", "ab")) == ["a", "b"]  # nobody listens
    with progress_bar.showing_units():
        for _ in units("comparing layers", range(20)):
            clock[0] += 3
            list(units("short", range(2)))
        for done in range(3):
            clock[0] += 8
            reporter("recording")(done, 30)
    lines = [line for line in capsys.readouterr().err.splitlines() if "each" in line]
    assert len(lines) == 1 and lines[0].endswith("recording: 8.0 s each, 29 more in about 03:52")
