"""Measure adapters in use together: in their weights, and in what the base's UNet says with them.

A concept's output error is 0 when it is drawn as if alone, and 1 when the others disturb it by as much as its own
effect is large. Drift is how far prompts without any concept move from what the base says.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusion.cli.console import add_base_arguments, open_base, table


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion evaluate ADAPTER ... [options]"
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files, single or fused")
    add("--prompts", nargs="+", metavar="TEXT", help='prompts to measure on, with {token}: "a {token} in the snow"')
    add("--concept_free", nargs="+", metavar="TEXT", help="prompts that should not change at all")
    add("--seed", type=int, default=0, metavar="N", help="of pictures and noise (default: 0)")
    add("--json", action="store_true", help="print everything as JSON, for programs")
    add_base_arguments(parser)


def run(args: Namespace) -> None:
    from fusion.evaluation.report import LEGEND, evaluate
    from fusion.formats.reading import load

    adapters = [load(path) for path in args.adapters]
    pipe = open_base(args.base, args, args.dtype)
    report = evaluate(pipe, adapters, prompts=args.prompts, concept_free=args.concept_free, seed=args.seed)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
        return
    print(f"{report.compatibility.verdict}: {report.compatibility.sentence}\n")
    table(report.rows())
    print(f"\n{LEGEND}")
