"""Measure adapters in use together: in their weights, and in what the base's UNet says with them.

A concept's output error is 0 when it is drawn as if alone, and 1 when the others disturb it by as much as its own
effect is large. Drift is how far prompts without any concept move from what the base says.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from fusion.cli.console import UsageError, add_base_arguments, notes, open_base, table, verdict


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion evaluate ADAPTER ... [options]"
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files, single or fused")
    add("--prompts", nargs="+", metavar="TEXT", help='prompts to measure on, with {token}: "a {token} in the snow"')
    add("--concept_free", nargs="+", metavar="TEXT", help="prompts that should not change at all")
    what = "pictures of a concept: also judge what is drawn, by their likeness; repeatable"
    add("--references", action="append", default=[], metavar="<TOKEN>=FOLDER", help=what)
    add("--judge", metavar="NAME", help="CLIP folder or hub id to judge by (default: the embedded pocket-clip)")
    add("--seeds", type=int, default=4, metavar="N", help="pictures of each kind to judge (default: 4)")
    add("--seed", type=int, default=0, metavar="N", help="of pictures and noise (default: 0)")
    add("--activations", action="store_true", help="also measure how loud each is at the inputs of the others")
    add("--json", action="store_true", help="print everything as JSON, for programs")
    add_base_arguments(parser)


def run(args: Namespace) -> None:
    from fusion.evaluation.report import evaluate
    from fusion.formats.adapter_file import load

    adapters = [load(path) for path in args.adapters]
    pipe = open_base(args.base, args, args.dtype)
    report = evaluate(
        pipe,
        adapters,
        prompts=args.prompts,
        concept_free=args.concept_free,
        references=references(args.references),
        judge=judge(args),
        seeds=args.seeds,
        seed=args.seed,
        activations=args.activations,
    )
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
        return
    verdict(report.compatibility.verdict, report.compatibility)
    print()
    for rows in (report.rows(), report.seen_rows()):
        if rows:
            table(rows)
            print()
    notes(report.remarks())


def references(pairs: list[str]) -> dict[str, list[Any]]:
    """`<token>=folder` as the pictures in the folder."""
    from fusion.training.dataset_files import is_picture, visible
    from fusion.training.pictures import load_picture

    found: dict[str, list[Any]] = {}
    for pair in pairs:
        token, equals, folder = pair.partition("=")
        if not equals:
            raise UsageError(f'--references takes "<token>=FOLDER", got "{pair}".')
        found[token] = [load_picture(path) for path in visible(Path(folder)) if is_picture(path)]
    return found


def judge(args: Namespace) -> Any:
    from fusion.evaluation.clip_judge import open_judge

    return open_judge(args.judge, device=args.device) if args.references else None
