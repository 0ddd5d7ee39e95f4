"""`python -m benchmarks.laboratory`: teach, draw, judge and write docs/fusion-bench.md.

Stopped, or run twice at once, it goes on from what is there and shares the work. On two cores two processes with
OMP_NUM_THREADS=1 and OMP_WAIT_POLICY=PASSIVE are faster than one with two threads.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.laboratory import prediction, rates, report
from benchmarks.laboratory.arms import arms
from benchmarks.laboratory.concepts import NAMES, concepts
from benchmarks.laboratory.plan import FULL, QUICK, Plan, narrowed
from benchmarks.laboratory.scoring import Laboratory
from benchmarks.laboratory.store import HOME, Busy, Missing, Store
from benchmarks.laboratory.teaching import School
from fusion.models.pipelines import embedded


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laboratory", description=__doc__)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="two concepts, few steps: minutes; printed, not written")
    part.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        choices=arms(),
        help="these rows alone, printed, not written; names as there",
    )
    parser.add_argument("--concepts", type=int, default=8, help="with --arms: how many (default: %(default)s)")
    parser.add_argument("--base", help="folder or hub id (default: the embedded pocket)")
    parser.add_argument("--judge", type=Path, help="folder of a CLIP model (default: the embedded pocket-clip)")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--store", type=Path, default=HOME, help="where results are kept (default: %(default)s)")
    parser.add_argument(
        "--only", choices=("teach", "draw", "write"), help="this part; write: what is there, naming the rest"
    )
    parser.add_argument("--output", type=Path, default=report.OUTPUT, help="default: %(default)s")
    options = parser.parse_args()
    if options.arms and not 2 <= options.concepts <= len(NAMES):
        parser.error(f"--concepts {options.concepts}: pairs need two, and there are {len(NAMES)}.")
    plan = narrowed(options.arms, options.concepts) if options.arms else QUICK if options.quick else FULL
    store = Store(options.store, wait=False, make=options.only != "write")
    school = School(store, plan.size, options.base, options.device)
    laboratory = Laboratory(store, school, options.judge or embedded("pocket-clip", "config.json"), range(plan.seeds))
    if plan.searched and options.only != "draw":
        work([partial(rates.search, laboratory, recipe, plan.tried) for recipe in plan.searched])
    for recipe in plan.searched:
        with suppress(Missing):
            laboratory.rates[recipe] = rates.best(rates.search(laboratory, recipe, plan.tried))
    if options.only != "write":
        work(tasks(laboratory, plan, options.only))
    if options.only in (None, "write"):
        text = report.write(laboratory, plan, options.output if plan is FULL else None)
        print(f"wrote {options.output}" if plan is FULL else text)


def tasks(laboratory: Laboratory, plan: Plan, only: str | None) -> list[Callable[[], Any]]:
    """Everything to be done, in an order in which what is wanted most comes first."""
    teach: list[Callable[[], Any]] = []
    if only != "draw":
        wanted = [(arms()[row.arm].recipe, k, c) for row in plan.rows for k, c in enumerate(concepts(row.names))]
        teach = [partial(laboratory.taught, recipe, c, k) for recipe, k, c in wanted]
    draw: list[Callable[[], Any]] = []
    if only != "teach":
        draw = [partial(laboratory.score, row.arm, concepts(row.names), pairs=row.pairs) for row in plan.rows]
        draw += [partial(prediction.predict, laboratory, recipe, concepts(plan.predicted)) for recipe in plan.recipes]
    return [*teach, *draw]


def work(pending: list[Callable[[], Any]]) -> None:
    """Do all of it; what another process has in hand is asked for again later."""
    while pending:
        busy: list[Callable[[], Any]] = []
        for task in pending:
            try:
                task()
            except Busy:
                busy.append(task)
        if len(busy) == len(pending):
            time.sleep(5)
        pending = busy


if __name__ == "__main__":
    main()
