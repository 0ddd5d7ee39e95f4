"""`python -m benchmarks.laboratory`: teach, draw, judge and write docs/fusion-bench.md.

A run that was stopped continues from the stored results, and several processes share the work. On two
cores two processes with OMP_NUM_THREADS=1 and OMP_WAIT_POLICY=PASSIVE are faster than one with two threads.
"""

import argparse
from pathlib import Path

from benchmarks.laboratory.arms import arms
from benchmarks.laboratory.concepts import NAMES, ROOT
from benchmarks.laboratory.store import HOME

OUTPUT = ROOT / "docs" / "fusion-bench.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laboratory", description=__doc__)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="two concepts, few steps: minutes; printed, not written")
    part.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        choices=arms(),
        help="these rows alone, printed, not written; names as in the tables",
    )
    sets = [*map(str, range(1, len(NAMES) + 1)), "look-alikes"]
    parser.add_argument(
        "--concepts",
        nargs="+",
        metavar="N",
        choices=sets,
        default=["8"],
        help=f"with --arms: how many, 1 to {len(NAMES)}, or look-alikes; several sets one after another (default: 8)",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[], metavar="Q", help="with --arms: also distil at these ranks"
    )
    parser.add_argument("--base", help="folder or hub id (default: the embedded pocket)")
    parser.add_argument("--judge", type=Path, help="folder of a CLIP model (default: the embedded pocket-clip)")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--store", type=Path, default=HOME, help="folder of results (default: %(default)s)")
    parser.add_argument(
        "--only", choices=("teach", "draw", "write"), help="this part; write: what is there, and the names of the rest"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()

    from benchmarks.laboratory import schedule

    schedule.run(options)


if __name__ == "__main__":
    main()
