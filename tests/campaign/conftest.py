"""The campaign's effort: a sample by default, minutes with --campaign, hours of soaking with --soak."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from campaign.fork_server import ForkServer

# Which share of the minutes each part gets; targets and clients take as long as they take.
SHARES = {"kills": 0.6, "fuzz": 0.3, "races": 0.05, "studio": 0.05}
FIGURES = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("campaign")


@pytest.fixture(scope="session")
def server(folder) -> Iterator[ForkServer]:
    """A fork server with the base, the adapters and the inputs written."""
    server = ForkServer(folder)
    server.call("campaign.materials:write", folder)
    server.call("campaign.materials:write_inputs", folder)
    yield server
    server.close()


@pytest.fixture(scope="session")
def minutes(pytestconfig) -> float:
    """Of the long form; 0 for the sample."""
    return pytestconfig.getoption("--campaign")


@pytest.fixture(scope="session")
def seed(pytestconfig) -> int:
    return pytestconfig.getoption("--campaign_seed")


@pytest.fixture
def rounds(minutes) -> Callable[[str], Iterator[int]]:
    """Numbers of rounds while the time of a part lasts; one round for the sample."""

    def count(part: str) -> Iterator[int]:
        number, end = 0, time.monotonic() + 60 * minutes * SHARES[part]
        while not number or time.monotonic() < end:
            yield number
            number += 1

    return count


@pytest.fixture
def figures(pytestconfig, request) -> Callable[[object], None]:
    """Show figures of this part when all tests have ended."""
    table = pytestconfig.stash.setdefault(FIGURES, {})

    def show(text: object) -> None:
        table[request.node.name] = str(text)

    return show


def pytest_terminal_summary(terminalreporter, config) -> None:
    if config.getoption("--campaign") or config.getoption("--soak"):
        for name, text in config.stash.get(FIGURES, {}).items():
            terminalreporter.write_line(f"{name}: {text}")
