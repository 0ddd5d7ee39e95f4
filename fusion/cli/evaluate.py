"""Measure adapters in use together: in their weights, and in what the base's UNet says with them.

A concept's output error is 0 when it is drawn as if alone, and 1 when the others disturb it by as much as its own
effect is large. Drift is how far prompts without any concept move from what the base says.
"""

import argparse
import json
from pathlib import Path

from fusion.cli.console import add_base_arguments, columns, open_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fusion evaluate ADAPTER ... [options]"
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files, single or fused")
    add("--prompts", nargs="+", metavar="TEXT", help='prompts to measure on, with {token}: "a {token} in the snow"')
    add("--concept_free", nargs="+", metavar="TEXT", help="prompts that should not change at all")
    add("--seed", type=int, default=0, metavar="N", help="of pictures and noise (default: 0)")
    add("--json", action="store_true", help="print everything as JSON, for programs")
    add_base_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from fusion.evaluation.report import evaluate
    from fusion.evaluation.survival import CONCEPT_FREE, PROMPTS
    from fusion.formats.reading import load

    adapters = [load(path) for path in args.adapters]
    pipe = open_base(args.base, args, args.dtype)
    report = evaluate(
        pipe, adapters, prompts=args.prompts or PROMPTS, concept_free=args.concept_free or CONCEPT_FREE, seed=args.seed
    )
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
        return
    print(f"{report.compatibility.verdict}: {report.compatibility.sentence}\n")
    now, plain = report.gated, report.ungated
    rows = [("output error", "as the files say", "as plain LoRA, ungated")]
    rows += [(token, f"{error:.3f}", f"{plain.output_error[token]:.3f}") for token, error in now.output_error.items()]
    rows += [("drift without concepts", f"{now.drift:.4f}", f"{plain.drift:.4f}")]
    print("\n".join(columns(rows)))
    print("\n0: drawn as if alone; 1: disturbed by as much as the concept itself changes.")
