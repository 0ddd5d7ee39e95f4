"""Measure adapters used together: in their weights, and in the predictions of the base's UNet.

A concept's output error is 0 when it is drawn as if alone, and 1 when the others change its prediction as much as the
concept itself does. Drift is how much the prediction changes on prompts without any concept.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fusion.cli.console import (
    UsageError,
    add_base_arguments,
    number,
    open_base,
    print_compatibility,
    print_list,
    print_table,
)  # fmt: skip
from fusion.cli.progress_bar import progress, show_phases
from fusion.config import MAX_SEED, MAX_SEEDS


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion evaluate ADAPTER ... [options]"
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter files, single or fused")
    add("--prompts", nargs="+", metavar="TEXT", help='prompts to measure on, with {token}: "a {token} in the snow"')
    add("--concept_free", nargs="+", metavar="TEXT", help="prompts that should not change at all")
    references = "pictures of a concept: also compare drawn pictures with them; repeatable"
    add("--references", action="append", default=[], metavar="<TOKEN>=FOLDER", help=references)
    add("--judge", metavar="NAME", help="CLIP folder or hub id to judge by (default: the embedded pocket-clip)")
    text = "pictures of each kind to judge (default: 4)"
    add("--seeds", type=number(int, 1, MAX_SEEDS), default=4, metavar="N", help=text)
    add(
        "--seed",
        type=number(int, 0, MAX_SEED - MAX_SEEDS),
        default=0,
        metavar="N",
        help="of pictures and noise (default: 0)",
    )
    add("--activations", action="store_true", help="also measure each one's response to the inputs of the others")
    text = "gated adapters that ADAPTER was distilled from: only compare the UNet's predictions with theirs"
    add("--distilled_from", nargs="+", type=Path, metavar="GATED", help=text)
    text = "layers left out at the end of the text encoder, as in generate (default: the base's own)"
    add("--clip_skip", type=number(int, 0, 32), metavar="N", help=text)
    text = "denoising steps of the pictures (default: the base's own)"
    add("--num_inference_steps", "--steps", type=number(int, 1, 1000), metavar="N", help=text)
    add("--json", action="store_true", help="print everything as JSON, for programs")
    add_base_arguments(parser, draws=True)


def run(args: Namespace) -> None:
    from fusion.evaluation.report import evaluate
    from fusion.formats.adapter_file import load

    adapters = [load(path) for path in args.adapters]
    if args.distilled_from:
        compare_with_gated(adapters, [load(path) for path in args.distilled_from], args)
        return
    pipe = open_base(args.base, args, args.dtype)
    names = ("prompts", "concept_free", "seeds", "seed", "activations", "clip_skip", "num_inference_steps")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    references, judge = load_references(args.references), choose_judge(args)
    with progress() as advance:
        show = partial(show_phases(advance, sys.stderr), "drawing pictures to judge")  # stdout may be JSON
        report = evaluate(pipe, adapters, references=references, judge=judge, on_progress=show, **options)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
        return
    print_compatibility(report.compatibility.verdict, report.compatibility)
    print()
    for rows in (report.rows(), report.picture_rows()):
        if rows:
            print_table(rows)
            print()
    print_list(report.remarks())


def compare_with_gated(adapters: list[Any], gated: list[Any], args: Namespace) -> None:
    """Print how exactly a distilled adapter predicts what the gated ones do."""
    from fusion.evaluation.output_error import CONCEPT_FREE, PROMPTS, measure_distillation

    if len(adapters) != 1:
        raise UsageError(f"--distilled_from compares one adapter with what it was distilled from, got {len(adapters)}.")
    prompts, free = args.prompts or PROMPTS, args.concept_free or CONCEPT_FREE
    pipe = open_base(args.base, args, args.dtype)
    options = {"seed": args.seed, "clip_skip": args.clip_skip or 0}
    errors = measure_distillation(pipe, adapters[0], gated, prompts=prompts, concept_free=free, **options)
    if args.json:
        print(json.dumps(asdict(errors), indent=2))
        return
    print_table(errors.rows())
    print_list(["Output error: 0 as the gated adapters, 1 as far from them as the base with the embeddings alone."])


def load_references(pairs: list[str]) -> dict[str, list[Any]]:
    """The pictures of every `<token>=folder`, by token."""
    from fusion.formats.picture_file import load_picture
    from fusion.training.dataset_files import is_picture, visible

    references: dict[str, list[Any]] = {}
    for pair in pairs:
        token, equals, folder = pair.partition("=")
        if not equals:
            raise UsageError(f'--references takes "<token>=FOLDER", got "{pair}".')
        references[token] = [load_picture(path) for path in visible(Path(folder)) if is_picture(path)]
    return references


def choose_judge(args: Namespace) -> Any:
    from fusion.evaluation.clip_judge import open_judge

    return open_judge(args.judge, device=args.device) if args.references else None
