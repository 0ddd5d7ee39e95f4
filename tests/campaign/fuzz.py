"""Changed inputs through every reader, under limits of memory and time.

An input is a function of seed, reader and number, so that each one can be made again: `python -m campaign.fuzz FOLDER
SEED READER NUMBER` with a folder that `materials` has filled.
"""

import gc
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import fusion
from campaign import laws, materials
from campaign.mutations import Mutations, Unchanged
from campaign.readers import READERS
from fusion.errors import FusionError

MAX_SECONDS = 2.0  # of CPU time, for one input
HANG = 30  # seconds
MEMORY = 4  # times the size of the input, and
SPARE_MEMORY = 64 * 2**20  # bytes that any reader may take
LIMIT = 3 * 2**30  # bytes of address space beside what the process has
MAX_MESSAGE = 3000  # letters
BATCH = 200  # inputs of one process


@dataclass
class Tally:
    """What became of the inputs of one reader."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    largest: float = 0.0  # MB that one input took
    problems: list[str] = field(default_factory=list)


class Hang(BaseException):
    pass


def fuzz(folder: Path, seed: int, name: str, first: int, count: int) -> Tally:
    """So many inputs of one reader, from number `first` on. Called in a process of its own, whose memory it limits."""
    state, tally = prepared(folder, name), Tally()
    problem = one(folder, Unchanged(), name, state, tally)
    assert bool(tally.accepted) == READERS[name].accepts and not problem, (
        f"{name}: a valid input is refused, or {problem}"
    )
    tally = Tally()
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + LIMIT,) * 2)
    for number in range(first, first + count):
        problem = one(folder, Mutations(f"{seed} {name} {number}"), name, state, tally)
        if problem:
            tally.problems.append(f"{name} {number}: {problem}")
    return tally


def prepared(folder: Path, name: str) -> Any:
    """What a reader needs beside its input."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hang)
    if name == "checkpoints":
        return load_file(folder / "inputs" / "checkpoint-2" / "state.safetensors")
    pipe = fusion.open_pipeline(folder / materials.BASE, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    pipe.rex = fusion.load(folder / "inputs" / "adapters" / "additive.safetensors")
    return pipe


def _hang(*_: object) -> None:
    raise Hang


def one(folder: Path, mutations: Mutations, name: str, state: Any, tally: Tally) -> str:
    """Make one input and read it; returns what is wrong."""
    work = laws.fresh(folder / f"fuzz-{os.getpid()}")
    path = READERS[name].write(mutations, folder / "inputs", work)
    size, problems = sum(file.stat().st_size for file in files(path)), list[str]()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        problems += READERS[name].read(path, state)
        tally.accepted += 1
    except FusionError as error:
        tally.refused += 1
        problems += [f"a message of {len(str(error))} letters"] if len(str(error)) > MAX_MESSAGE else []
    except Hang:
        problems.append(f"hangs for {HANG} s")
    except BaseException as error:
        problems.append(f"{type(error).__name__} at {place(error)}: {str(error)[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, grown = time.process_time() - began, memory("VmHWM") - before
    tally.inputs, tally.slowest = tally.inputs + 1, max(tally.slowest, seconds)
    tally.largest = max(tally.largest, grown / 2**20)
    problems += [f"{seconds:.1f} s"] if seconds > MAX_SECONDS else []
    problems += [f"{grown / 2**20:.0f} MB for {size} bytes"] if grown > SPARE_MEMORY + MEMORY * size else []
    shutil.rmtree(work, ignore_errors=True)
    return "; ".join(dict.fromkeys(problems))


def files(path: Path) -> Iterator[Path]:
    yield from (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def memory(entry: str) -> int:
    """VmRSS, VmHWM (its largest value) or VmSize of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def place(error: BaseException) -> str:
    """Where in this project an exception comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/fusion/" in frame.filename] or frames
    return f"{'/'.join(Path(own[-1].filename).parts[-3:])}:{own[-1].lineno} {own[-1].name}"


def shares(count: int) -> dict[str, int]:
    """How many of `count` inputs each reader gets, at least one."""
    return {name: max(1, count * reader.weight // 100) for name, reader in READERS.items()}


if __name__ == "__main__":
    place_of, seed_of, reader, input_number = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    print(fuzz(place_of, seed_of, reader, input_number, 1))
