"""Lines that say how long a phase takes."""

import pytest

from fusion.cli import progress_bar


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
