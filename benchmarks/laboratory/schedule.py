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
from benchmarks.laboratory.plan import DISTILLED, FULL, QUICK, Plan, Row, narrowed
from benchmarks.laboratory.scoring import Laboratory
from benchmarks.laboratory.store import Busy, Missing, Store
from benchmarks.laboratory.trainer import Trainer
from fusion.models.embedded_models import embedded


def run(options: Namespace) -> None:
    """All that the command line asks for."""
    plan = QUICK if options.quick else FULL
    if options.arms:
        plan = narrowed(options.arms, options.concepts, options.ranks)
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
    distil: list[Callable[[], Any]] = []
    draw: list[Callable[[], Any]] = []
    if only != "teach":
        distil = [partial(distil_row, laboratory, row) for row in plan.rows if arms()[row.arm].distillation]
        recipe = arms()[DISTILLED[0]].recipe
        distil += [partial(laboratory.at_rank, recipe, concepts(plan.predicted), rank) for rank in plan.ranks]
        draw = [partial(laboratory.score, row.arm, concepts(row.names), pairs=row.pairs) for row in plan.rows]
        draw += [partial(prediction.predict, laboratory, recipe, concepts(plan.predicted)) for recipe in plan.recipes]
    return [*teach, *distil, *draw]


def distil_row(laboratory: Laboratory, row: Row) -> None:
    laboratory.files_in_use(row.arm, laboratory.files(arms()[row.arm].recipe, concepts(row.names)))


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
