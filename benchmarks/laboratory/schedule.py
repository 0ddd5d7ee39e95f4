"""The tasks of a plan, which several processes can share."""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from benchmarks.laboratory import prediction, rates, report
from benchmarks.laboratory.arms import arms
from benchmarks.laboratory.concepts import concepts
from benchmarks.laboratory.plan import FULL, QUICK, Plan, narrowed
from benchmarks.laboratory.scoring import Laboratory
from benchmarks.laboratory.store import Busy, Missing, Store
from benchmarks.laboratory.trainer import Trainer
from fusion.models.embedded_models import embedded


def run(options: Namespace) -> None:
    """All that the command line asks for."""
    plan = narrowed(options.arms, options.concepts) if options.arms else QUICK if options.quick else FULL
    store = Store(options.store, wait=False, make=options.only != "write")
    trainer = Trainer(store, plan.size, options.base, options.device)
    laboratory = Laboratory(store, trainer, options.judge or embedded("pocket-clip", "config.json"), range(plan.seeds))
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
    """All tasks, the most important results first."""
    teach: list[Callable[[], Any]] = []
    if only != "draw":
        trainings = [(arms()[row.arm].recipe, k, c) for row in plan.rows for k, c in enumerate(concepts(row.names))]
        teach = [partial(laboratory.adapter_file, recipe, c, k) for recipe, k, c in trainings]
    draw: list[Callable[[], Any]] = []
    if only != "teach":
        draw = [partial(laboratory.score, row.arm, concepts(row.names), pairs=row.pairs) for row in plan.rows]
        draw += [partial(prediction.predict, laboratory, recipe, concepts(plan.predicted)) for recipe in plan.recipes]
    return [*teach, *draw]


def work(pending: list[Callable[[], Any]]) -> None:
    """Run all tasks; one that another process is running is tried again later."""
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
