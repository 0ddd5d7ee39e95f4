"""`python -m benchmarks`: run the measurements and write benchmarks/RESULTS.md."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import balance, fusing, gating, regression, training
from benchmarks.bases import Base
from benchmarks.report import Section, machine, write

RESULTS = Path(__file__).parent / "RESULTS.md"
MEASUREMENTS: dict[str, Callable[[Base, Callable[[str], None]], Section]] = {
    "training": training.measure,
    "gating": gating.measure,
    "fusing": fusing.measure,
    "files": fusing.measure_files,
    "spectra": fusing.measure_spectra,
    "balance": balance.measure,
    "regression": regression.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="measure this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="toy sizes, printed instead of written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Markdown file; its other sections are kept")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = Base(toy=options.quick)
    for name in options.only or MEASUREMENTS:
        start = time.monotonic()
        section = MEASUREMENTS[name](base, lambda line, name=name: print(f"  {name}: {line}", file=sys.stderr))
        section.text += f"\n\n{machine()}"
        if not options.quick:
            write(options.output, [section])
        print(f"{section.markdown()}\n\n({time.monotonic() - start:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
