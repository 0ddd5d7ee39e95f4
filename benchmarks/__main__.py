"""`python -m benchmarks`: run the measurements and write benchmarks/RESULTS.md."""

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "RESULTS.md"
MEASUREMENTS = {  # imported when they run, so that help is immediate
    "training": "training.measure",
    "drawing": "drawing.measure",
    "fusing": "fusing.measure",
    "files": "fusing.measure_files",
    "spectra": "fusing.measure_spectra",
    "balance": "balance.measure",
    "regression": "regression.measure",
}


def measurement(name: str) -> Any:
    """The function of a measurement: (base, log) -> Section."""
    module, _, function = MEASUREMENTS[name].partition(".")
    return getattr(import_module(f"benchmarks.{module}"), function)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="measure this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="toy sizes, printed instead of written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Markdown file; its other sections are kept")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import; diffusers' pipelines cause advice

    import torch

    from benchmarks.bases import Base
    from benchmarks.report import machine, write

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = Base(toy=options.quick)
    for name in options.only or MEASUREMENTS:
        start = time.monotonic()
        section = measurement(name)(base, lambda line, name=name: print(f"  {name}: {line}", file=sys.stderr))
        section.text += f"\n\n{machine()}"
        if not options.quick:
            write(options.output, [section])
        print(f"{section.markdown()}\n\n({time.monotonic() - start:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
