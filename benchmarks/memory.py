"""Peak memory of a piece of work, as recorded by torch's profiler.

The resident size of the process mostly consists of the 3.8 GB base and of memory that malloc does not return, and it
varies more than the differences measured here. The profiler records every allocation and release of every tensor,
also inside operators and in the backward pass, and gives the same number on every run.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

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
