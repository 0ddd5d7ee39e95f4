"""The campaign: a sample of it here, all of it with `pytest tests/campaign --campaign MINUTES` and `--soak HOURS`."""

import sys
from collections import Counter

import pytest

from campaign.fuzz import BATCH, shares

pytestmark = [
    pytest.mark.slow,
    pytest.mark.campaign,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork, /proc, capset and tmpfs are Linux's"),
]
# Kills of each workload in a sample, and in each round of the long form.
SAMPLE = {"train": 2, "fuse": 1, "export": 1, "generate": 1, "bake": 1, "library rename": 2, "library delete": 1}
ROUND = {"train": 4, "train with class pictures": 2, "fuse": 2, "export": 3, "generate": 3, "compare": 1, "bake": 2}
ROUND |= {"inspect": 1, "library add": 2, "library rename": 2, "library delete": 2, "studio": 1, "distill": 3}
ROUND |= {"comfyui": 1, "space": 1}
SAMPLE_WRITERS = ["export", "generate"]


def test_kills(server, folder, seed, minutes, rounds, figures):
    """Whatever is killed whenever: no half file under a final name, no training that cannot be finished, nothing left
    over after the next command; a resumed training gives the same bits as an uninterrupted one."""
    kills, problems = Counter(), []
    for number in rounds("kills"):
        tally, wrong = server.call("campaign.kills:run", folder, seed + number, ROUND if minutes else SAMPLE)
        kills, problems = kills + Counter(tally), problems + wrong
    figures(f"{sum(kills.values()) - kills['ended before the kill']} kills: {dict(kills)}")
    assert not problems, "\n".join(problems)


def test_impossible_targets(server, folder, minutes, figures):
    """Every verb into every file, folder and disk that cannot or must not be written: one line, exit code 1 or 2."""
    rows, problems = server.call("campaign.targets:run", folder, None if minutes else SAMPLE_WRITERS)
    figures(f"{len(rows)} pairs of verb and target, {sum(map(bool, rows.values()))} wrong")
    assert not problems, "\n".join(problems)


def test_fuzz(server, folder, seed, minutes, rounds, figures):
    """Changed inputs of every reader: only FusionError or a right result, within limits of time and memory."""
    tallies, problems = {}, []
    for number in rounds("fuzz"):
        for name, count in shares(10 * BATCH if minutes else 100).items():
            for first in range(number * count, (number + 1) * count, BATCH):
                size = min(BATCH, (number + 1) * count - first)
                tally = server.call("campaign.fuzz:fuzz", folder, seed, name, first, size)
                tallies.setdefault(name, []).append(tally)
                problems += tally.problems
    table = {
        name: (sum(t.inputs for t in parts), sum(t.accepted for t in parts), max(t.slowest for t in parts))
        for name, parts in tallies.items()
    }
    total = sum(inputs for inputs, *_ in table.values())
    figures(f"{total} inputs; by reader: inputs, accepted, slowest in seconds: {table}")
    assert not problems, "\n".join(problems)


def test_races(server, folder, seed, minutes, rounds, figures):
    """Processes side by side in one library lose nothing and have no slice twice."""
    counts, problems = Counter(), []
    for number in rounds("races"):
        tally, wrong = server.call("campaign.races:run", folder, seed + number, 12 if minutes else 2)
        counts, problems = counts + Counter(tally), problems + wrong
    figures(dict(counts))
    assert not problems, "\n".join(problems)


def test_four_clients_on_one_studio(server, folder):
    problems = server.call("campaign.studio:four_clients", folder)
    assert not problems, "\n".join(problems)


def test_studio_endpoints(server, folder, seed, minutes, rounds, figures):
    """Hostile values to every endpoint of the studio: a result or a sentence, and the studio is as it was."""
    endings, problems = Counter(), []
    for number in rounds("studio"):
        tally, wrong = server.call("campaign.studio_fuzz:fuzz", folder, seed + number, 200 if minutes else 38)
        endings, problems = endings + Counter(tally), problems + wrong
    figures(f"{sum(endings.values())} calls: {dict(endings)}")
    assert not problems, "\n".join(problems)


def test_soak(server, folder, pytestconfig, figures):
    """Memory, vocabulary, handles, threads and temporary files are the same after many cycles."""
    seconds = 3600 * pytestconfig.getoption("--soak")
    measures, problems = server.call("campaign.soak:soak", folder, seconds, 5)
    figures(f"{len(measures)} cycles, from {measures[len(measures) // 5]} to {measures[-1]}")
    assert not problems, "\n".join(problems)
