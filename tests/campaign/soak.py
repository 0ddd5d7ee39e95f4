"""Hours of attaching, drawing, training and detaching in one process: what it takes stays the same."""

import ctypes
import gc
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fusion
from campaign import fuzz, laws, materials

MAX_GROWTH = 24 * 2**20  # bytes of memory from the second fifth of a soak to its last, whatever its length


@dataclass(frozen=True)
class Measure:
    """What the process takes after a cycle."""

    memory: int  # bytes
    words: int  # in the tokenizer
    handles: int
    threads: int
    files: int  # in the system's temporary folder, and partial ones


def soak(folder: Path, seconds: float, cycles: int) -> tuple[list[Measure], list[str]]:
    """At least so many cycles and seconds. Returns a measure after each cycle, and what has grown."""
    work = laws.fresh(folder / "soak", folder / "data", folder / "lib")
    os.environ["TMPDIR"], tempfile.tempdir = str(work / laws.TEMPORARY), None
    (work / laws.TEMPORARY).mkdir()
    os.chdir(work)
    pipe, end = fusion.open_pipeline(folder / materials.BASE, device="cpu"), time.monotonic() + seconds
    pipe.set_progress_bar_config(disable=True)
    measures, digests = list[Measure](), set[str]()
    while len(measures) < cycles or time.monotonic() < end:
        digests |= {cycle(pipe, len(measures)).hex()}
        measures.append(measure(pipe, work))
    return measures, growth(measures) + (["the same prompt gives different pictures"] if len(digests) > 1 else [])


def cycle(pipe: object, number: int) -> bytes:
    """Draw with two adapters, train a concept, draw with it, put it into a library and remove it there."""
    library, token = fusion.Library("out"), f"<c{number}>"
    adapters = [fusion.load(f"lib/{name}.safetensors") for name in ("rex", "tom")]
    (picture,) = fusion.generate(pipe, fusion.GenerationConfig(prompt="a <rex> and a <tom>"), adapters)
    picture.save("out/picture.png")
    values = {"token": token, "noun": "dog", "instance_data_dir": Path("data"), "max_train_steps": 2}
    values |= {"targets": ["unet.attn2.to_k"], "output_dir": Path("out"), "checkpointing_steps": 2}
    for step in fusion.train(pipe, fusion.TrainingConfig(**values)):
        adapter = step.adapter
    library.save(adapter, "concept")
    with fusion.attach(pipe, fusion.load("out/concept.safetensors")):
        fusion.generate(pipe, fusion.GenerationConfig(prompt=f"a {token}"))
    library.remove("concept")
    shutil.rmtree("out/checkpoints")
    return picture.image.tobytes()


def measure(pipe: object, work: Path) -> Measure:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    files = sum(file.is_file() for file in (work / laws.TEMPORARY).rglob("*")) + len(laws.hidden_files(work))
    handles = len(list(Path("/proc/self/fd").iterdir()))
    return Measure(fuzz.memory("VmRSS"), len(pipe.tokenizer), handles, threading.active_count(), files)


def growth(measures: list[Measure]) -> list[str]:
    """What was larger at the end: memory by more than MAX_GROWTH, anything else at all."""
    fifth = max(1, len(measures) // 5)
    early, late = measures[fifth : 2 * fifth], measures[-fifth:]

    def change(of: Callable[[Measure], int]) -> int:
        return int(statistics.median(map(of, late)) - statistics.median(map(of, early)))

    grown = {"words": change(lambda m: m.words), "handles": change(lambda m: m.handles)}
    grown |= {"threads": change(lambda m: m.threads), "temporary files": change(lambda m: m.files)}
    problems = [f"{count} more {name}" for name, count in grown.items() if count > 0]
    more = change(lambda m: m.memory)
    return problems + ([f"{more / 2**20:.0f} MB more memory"] if more > MAX_GROWTH else [])
