"""Peak memory of a piece of work, as recorded by torch's profiler.

The resident size of the process mostly consists of the 3.8 GB base and of memory that malloc does not return, and it
varies more than the differences measured here. The profiler records every allocation and release of every tensor,
also inside operators and in the backward pass, and gives the same number on every run.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that existed at once during `work`, beyond those that existed before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((size for _, _, size in steps), initial=0))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def card_memory(device: torch.device, limit: float | None = None) -> Generator[list[float]]:
    """During the block a GPU has `limit` gigabytes. Afterwards the list has the most that tensors took at once, and the
    most that torch reserved for them, in gigabytes; on a CPU it stays empty.
    """
    peaks: list[float] = []
    if device.type != "cuda":
        yield peaks
        return
    card = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(card).total_memory
    gc.collect()  # what lies in cycles still holds memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(card)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total) if limit else 1.0, card)
    try:
        yield peaks
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)
        peaks += [torch.cuda.max_memory_allocated(card) / 1e9, torch.cuda.max_memory_reserved(card) / 1e9]
