"""Processes side by side in one library: nothing is lost, nothing is given out twice."""

import itertools
import json
import random
import time
from functools import partial
from pathlib import Path

import fusion
import trained
from campaign import laws, materials
from campaign.processes import Child
from fusion.errors import SliceConflict

PROCESSES = 4
CAPACITY = 32  # directions of the toy's layers


def run(folder: Path, seed: int, rounds: int) -> tuple[dict[str, int], list[str]]:
    """Every race once. Returns what was done how often, and what went wrong."""
    tally, problems = dict[str, int](), list[str]()
    for race in (adding_and_renaming, reserving, training):
        counts, wrong = race(folder, seed, rounds)
        tally |= counts
        problems += [f"{race.__name__}, seed {seed}: {problem}" for problem in wrong]
    return tally, problems


def together(actions: list[partial], work: Path) -> list[str]:
    """Run them at the same time, each in a process; returns those that failed."""
    start = time.monotonic() + 0.1
    children = [Child(partial(_at, start, action), work) for action in actions]
    endings = [child.wait(300) for child in children]
    return [f"{ending.code}: {ending.last_lines}" for ending in endings if ending.code]


def _at(start: float, action: partial) -> None:
    time.sleep(max(0.0, start - time.monotonic()))
    action()


def adding_and_renaming(folder: Path, seed: int, rounds: int) -> tuple[dict[str, int], list[str]]:
    """All add files of one name, rename them to one other name, and remove some: as many files as there should be."""
    work = laws.fresh(folder / "race", folder / "lib")
    actions = [partial(_add_and_rename, seed, number, rounds) for number in range(PROCESSES)]
    problems = together(actions, work)
    left = list((work / "shared").glob("*.safetensors"))
    removed = sum(json.loads(path.read_text()) for path in work.glob("removed-*"))
    expected = PROCESSES * rounds - removed
    problems += [] if len(left) == expected else [f"{len(left)} files of {expected}"]
    problems += laws.half_results(work / "shared", {}, laws.contents(work / "shared"))
    problems += [f"{name} is left over" for name in laws.hidden_files(work)]
    return {"files added": PROCESSES * rounds, "files removed": removed}, problems


def _add_and_rename(seed: int, number: int, rounds: int) -> None:
    library, pick, removed = fusion.Library("shared"), random.Random(f"{seed} {number}"), 0
    for _ in range(rounds):
        path = library.add("lib/rex.safetensors", "same")
        if pick.random() < 0.6:
            path = library.rename(path.stem, "other")
        if pick.random() < 0.3:
            library.remove(path.stem)
            removed += 1
    Path(f"removed-{number}").write_text(str(removed))


def reserving(folder: Path, seed: int, rounds: int) -> tuple[dict[str, int], list[str]]:
    """All reserve slices, keep some of them by saving an adapter, and release: no two ever have the same."""
    work = laws.fresh(folder / "race")
    base = folder / materials.BASE
    problems = together([partial(_reserve, base, seed, number, rounds) for number in range(PROCESSES)], work)
    held = [tuple(row) for path in work.glob("held-*") for row in json.loads(path.read_text())]
    for (start, end, first), (other_start, other_end, other) in itertools.combinations(held, 2):
        if first == other and start < other_end and other_start < end:
            problems.append(f"direction {first} is given out twice")
    problems += [f"{name} is left over" for name in laws.hidden_files(work)]
    return {"slices reserved": len(held)}, problems


def _reserve(base: Path, seed: int, number: int, rounds: int) -> None:
    pipe, library, pick = (
        fusion.open_pipeline(base, device="cpu"),
        fusion.Library("shared"),
        random.Random(f"{seed} {number}"),
    )
    info, held = fusion.base_info(pipe), list[tuple[float, float, int]]()
    for round_number in range(rounds):
        try:
            reservation = library.reserve(info, 1, capacity=CAPACITY)
        except SliceConflict:
            break  # all directions are owned
        start, direction = time.monotonic(), next(iter(reservation.slice.indices))
        with reservation:
            time.sleep(pick.uniform(0, 0.01))
            if owns := pick.random() < 0.3:
                token = f"<t{number}-{round_number}>"
                adapter = trained.trained_adapter(pipe, token, k=direction, rank=1, targets=["unet.mid_block"])
                library.save(adapter, "same")
            end = float("inf") if owns else time.monotonic()
        held.append((start, end, direction))
    Path(f"held-{number}").write_text(json.dumps(held))


def training(folder: Path, seed: int, rounds: int) -> tuple[dict[str, int], list[str]]:
    """Trainings of different concepts side by side in one library: each has a slice of its own and the file it would
    have alone, and all have ended well."""
    work = laws.fresh(folder / "race", folder / "data")
    words = ["train", "--noun", "dog", "--instance_data_dir", "data", "--base", str(folder / materials.BASE)]
    words += ["--device", "cpu", "--max_train_steps", "2", "--targets", "unet.attn2.to_k", "--seed", str(seed)]
    names = ["one", "two", "three"][: min(3, 1 + rounds)]
    children = [Child([*words, "--token", f"<{name}>"], work) for name in names]
    endings = [child.wait(300) for child in children]
    problems = [f"{ending.code}: {ending.last_lines}" for ending in endings if ending.code or ending.traceback]
    slices = [entry.slices for entry in fusion.Library(work / "out").adapters()]
    problems += [] if len({*map(str, slices)}) == len(names) else [f"slices {slices}"]
    problems += [f"{name} is left over" for name in laws.hidden_files(work)]
    return {"trainings side by side": len(names)}, problems
