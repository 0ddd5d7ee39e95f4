"""Writes docs/fusion-bench.md from the scores, and its figures beside it."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.laboratory import figures, prediction, rates
from benchmarks.laboratory.arms import CONTROLS, arms, plain_arms
from benchmarks.laboratory.concepts import NAMES, concepts
from benchmarks.laboratory.distilling import costs
from benchmarks.laboratory.plan import CURVE, DISTILLED, LOOK_ALIKES, Plan
from benchmarks.laboratory.scoring import Laboratory
from benchmarks.laboratory.store import Missing
from benchmarks.laboratory.trainer import RATE
from fusion.evaluation import plots
from fusion.evaluation.identity import MIN_EFFECT, RESAMPLES
from fusion.output_files import write_output

CONCLUSIONS = Path(__file__).with_name("conclusions.md")  # written by hand
SHEET_ARMS = (
    *("spectral", "spectral, places found", "spectral-gated-quiet", "spectral-gated-quiet, places found", "lora-gated"),
    *("spectral-open", "spectral-same", "orthogonal", "spectral-quiet", "lora-quiet"),
    *("spectral, exported", "spectral-gated-quiet, exported"),
    *("lora, direct_sum", "lora, average", "lora, ties", "lora, regression", "lora, switch", "lora, composite"),
)

LEGEND = """\
Retention: similarity to the references by the judge, 1 as its adapter draws it alone, 0 as the base draws the noun, all
concepts pooled; with the 95 % bootstrap interval over concepts. Leakage: similarity to the *other* concepts, above that
of the adapter alone. Beside: retention beside an ordinary thing. Missing: share of pairs' crops without their concept.
Drift: 1 − cosine to the base's own picture, on prompts without any concept, and on the concepts' plain nouns.
UNet error: 0 predicts the same as the adapter alone, 1 differs as much as the concept's own effect."""


def retention(now: Sequence[float], alone: Sequence[float]) -> tuple[float, str]:
    """How much of what adapters add to their nouns remains: sum over sum, so that a concept that is hardly drawn counts
    little; and as text, with the 95 % bootstrap interval over concepts. NaN where adapters add too little."""
    if not len(now) or np.mean(alone) <= MIN_EFFECT:
        return float("nan"), "–"
    parts = np.stack([np.asarray(now), np.asarray(alone)])
    samples = torch.randint(len(now), (RESAMPLES, len(now)), generator=torch.Generator().manual_seed(0)).numpy()
    above, below = parts[:, samples].sum(axis=2)
    low, high = np.quantile(above / below, [0.025, 0.975])
    share = float(parts[0].sum() / parts[1].sum())
    return share, f"{share:.2f} ({low:.2f} to {high:.2f})"


def single_retention(identity: dict[str, Any]) -> tuple[float, str]:
    """Retention in pictures of one concept."""
    gaps = np.subtract(identity["alone"], identity["floor"])
    return retention(gaps * [entry["mean"] for entry in identity["retention"]], gaps)


def pair_retention(identity: dict[str, Any]) -> tuple[float, str]:
    if not identity["pair_retention"]:
        return retention((), ())
    now, change = (np.diagonal(identity[key]) for key in ("matrix", "leakage"))
    return retention(now - identity["floor"], now - change - identity["floor"])


def off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """The mean of what others gain, 0 for one concept."""
    values = np.asarray(matrix)[~np.eye(len(matrix), dtype=bool)]
    return float(values.clip(min=0).mean()) if len(values) else 0.0


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def row_of(score: dict[str, Any]) -> list[str]:
    identity = score["identity"]
    error = float(np.mean(score["error"])) if "error" in score else None
    return [
        score["arm"],
        single_retention(identity)[1],
        number(off_diagonal(identity["single_leakage"]), 3),
        pair_retention(identity)[1],
        number(off_diagonal(identity["leakage"]), 3),
        f"{identity['omission']:.0%}" if identity["pair_retention"] else "–",
        number(retention(*([row[key] for row in score["beside"]] for key in ("now", "alone")))[0]),
        number(score["drift"], 3),
        number(score["nouns"], 3),
        number(error),
        f"{score['ready_seconds']:.1f}",
        f"{score['picture_seconds']:.1f}",
        f"{score['bytes'] / 1e6:.1f}" if "bytes" in score else "–",
    ]


def distilled_row(score: dict[str, Any]) -> list[str]:
    arm, retained, _, pairs, _, missing, _, drift, nouns, error, *_ = row_of(score)
    cost = score.get("distillation") or {"files": 1, "bytes": score["bytes"]}
    times = f"{cost['files']} × " if cost["files"] > 1 else ""
    return [
        *(arm, retained, pairs, missing, drift, nouns, error),
        f"{times}{cost['bytes'] / 1e6:.1f}",
        f"{times}{cost['minutes']:.1f}" if "minutes" in cost else "–",
        *(number(cost.get(kind), 4) for kind in figures.HELD_OUT),
    ]


DISTILLED_HEADINGS = (
    *("concepts", "arm", "retention", "in pairs", "missing", "drift", "drift of nouns", "UNet error"),
    *("file, MB", "minutes", *(f"held out: {name}" for name, _ in figures.HELD_OUT.values())),
)
HEADINGS = (
    *("arm", "retention", "leakage", "in pairs", "leakage in pairs", "missing", "beside", "drift", "drift of nouns"),
    *("UNet error", "fuse, s", "picture, s", "file, MB"),
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(laboratory: Laboratory, plan: Plan, output: Path | None) -> str:
    """The report as text; with `output` also written there, with its figures."""
    scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    predicted: dict[str, Any] = {}
    missing: list[str] = []
    for row in plan.rows:
        try:
            scored[row.arm, row.names] = laboratory.score(row.arm, concepts(row.names), pairs=row.pairs)
        except Missing:
            missing.append(f"{row.arm} with {len(row.names)} concepts")
    for recipe in plan.recipes:
        try:
            predicted[recipe] = prediction.predict(laboratory, recipe, concepts(plan.predicted))["rows"]
        except Missing:
            missing.append(f"the prediction for {recipe}")
    main = plan.predicted  # the set on which every arm is scored
    full = [scored[arm, main] for arm in arms() if (arm, main) in scored]
    at_ranks: dict[int, dict[str, Any]] = {}
    for rank in plan.ranks:
        try:
            at_ranks[rank] = costs([laboratory.at_rank(arms()[DISTILLED[0]].recipe, concepts(main), rank)])
        except Missing:
            missing.append(f"the distillation at rank {rank}")
    folder = output.parent if output else None
    parts = [
        "# Which way of using several concepts together keeps them apart",
        CONCLUSIONS.read_text(encoding="utf-8").strip() if CONCLUSIONS.exists() and output else "",
        setting(laboratory, plan, main),
        f"## {len(main)} concepts at once\n\n{LEGEND}\n\n{table(HEADINGS, [row_of(score) for score in full])}",
        descriptions(full),
        look_alikes(scored),
        controls(scored),
        plain(scored),
        learning_rates(laboratory, plan),
        curves(scored, folder),
        distillations(scored, at_ranks, folder),
        judge(full),
        matrices(full, folder),
        sheet(laboratory, main, full, folder),
        predictions(predicted, folder),
        f"Not measured yet: {'; '.join(missing)}." if missing else "",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    if output:
        write_output(output, text.encode())
    return text


def setting(laboratory: Laboratory, plan: Plan, names: Sequence[str]) -> str:
    size, prompts = plan.size, laboratory.prompts
    rate = "learning rates searched" if plan.searched else f"learning rate {RATE:g}"
    return "\n".join(
        [
            "## Setting\n",
            f"Base: pocket, 128 px. Concepts, all new to the base: {', '.join(names)}; eight pictures each.",
            f"Every adapter: rank {size.rank} on the text encoder and on keys and values of cross-attention, three",
            f"token vectors, {size.steps} steps of {size.batch} pictures, {rate}; {plan.seeds} seeds.",
            f"Prompts: `{prompts.single}`, `{prompts.pair}` around the ring of concepts,",
            f"each concept beside an ordinary thing, and {len(prompts.free)} without concepts. Judge: pocket-clip, on",
            "the half of the picture that should show a concept. `make bench-fusion` repeats only what changed.",
        ]
    )


def descriptions(full: Sequence[dict[str, Any]]) -> str:
    return table(("arm", "what it is"), [(score["arm"], arms()[score["arm"]].about) for score in full])


def look_alikes(scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]]) -> str:
    rows = [row_of(score) for (_, names), score in scored.items() if names == LOOK_ALIKES]
    return f"## Look-alikes: {', '.join(LOOK_ALIKES)}\n\n{table(HEADINGS, rows)}" if rows else ""


def controls(scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]]) -> str:
    """Controls beside what they must equal, or must not, on fewer concepts."""
    sets = [names for (arm, names) in scored if arm in CONTROLS]
    if not sets:
        return ""
    compared = ("spectral-open", "spectral-same", "lora, direct_sum", *CONTROLS)
    rows = [row_of(scored[arm, sets[0]]) for arm in compared if (arm, sets[0]) in scored]
    return f"## Controls of the ungated sum: {', '.join(sets[0])}\n\n{table(HEADINGS, rows)}"


def plain(scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]]) -> str:
    """Plain LoRAs of two concepts, as they are and bound to words."""
    rows = [row_of(score) for (arm, _), score in scored.items() if arm in plain_arms()]
    return f"## Plain LoRAs of two concepts, and bound to their words\n\n{table(HEADINGS, rows)}" if rows else ""


def learning_rates(laboratory: Laboratory, plan: Plan) -> str:
    if not plan.searched:
        return ""
    searches = {name: rates.search(laboratory, name, plan.tried) for name in plan.searched}
    rows = [
        [name, *(number(value, 3) for value in row.values()), f"{rates.best(row):g}"] for name, row in searches.items()
    ]
    return (
        "## Learning rates\n\nSimilarity to their references of two concepts drawn alone, at three rates. The base's "
        "own rate is kept unless another is better by 0.02.\n\n"
        + table(("recipe", *(f"{rate:g}" for rate in rates.RATES), "chosen"), rows)
    )


def curves(scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]], folder: Path | None) -> str:
    lines: dict[str, dict[int, tuple[float, float]]] = {}
    for (arm, names), score in scored.items():
        if arm in CURVE and names == NAMES[: len(names)]:
            identity = score["identity"]
            values = single_retention(identity)[0], off_diagonal(identity["single_leakage"])
            lines.setdefault(arm, {})[len(names)] = values
    counts = sorted({n for points in lines.values() for n in points})
    if len(counts) < 2:
        return ""
    rows = [[arm, *(f"{p[n][0]:.2f} / {p[n][1]:.3f}" if n in p else "–" for n in counts)] for arm, p in lines.items()]
    if folder:
        plots.write(figures.curves(lines), folder / "fusion-bench-curves.png")
    heading = table(("retention / leakage", *(f"N = {n}" for n in counts)), rows)
    return f"## More and more concepts\n\n![Retention and leakage](fusion-bench-curves.png)\n\n{heading}"


def distillations(
    scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]], at_ranks: dict[int, dict[str, Any]], folder: Path | None
) -> str:
    """Gated concepts distilled into plain LoRAs, on every set of concepts; and the distillation's own errors."""
    several = {key: score for key, score in scored.items() if "distillation" in score}
    if not several:
        return ""
    recipes = {arms()[arm].recipe for arm, _ in several}
    sets = {names: "look-alikes" if names == LOOK_ALIKES else str(len(names)) for _, names in several}
    rows = [
        [count, *distilled_row(scored[arm, names])]
        for names, count in sets.items()
        for arm in arms()
        if (arm, names) in scored and arm.split(", distilled")[0].removesuffix(", exported") in recipes
    ]
    parts = [
        "## Distilled into plain LoRAs\n\nThe same scores. File: kohya's form with the embeddings; minutes "
        "of one core. Held out: the distillation's own errors of keys and values, on prompts it has not learned from; "
        "with concepts 1 is as far as the base, without any it is a share of the base's keys and values.",
        table(DISTILLED_HEADINGS, rows),
    ]
    over_n = {
        arm: {len(n): s["distillation"] for (a, n), s in several.items() if a == arm and n == NAMES[: len(n)]}
        for arm in DISTILLED
    }
    if folder and (at_ranks or max(map(len, over_n.values())) > 1):
        plots.write(figures.distillations(over_n, at_ranks), folder / "fusion-bench-distilled.png")
        parts.append("![Error over the number of concepts and over the rank](fusion-bench-distilled.png)")
    return "\n\n".join(parts)


def judge(full: Sequence[dict[str, Any]]) -> str:
    """How reliable the judge is: its own errors, and a control."""
    if not full:
        return ""
    identity = full[0]["identity"]
    matrix = np.asarray(identity["matrix"])
    swapped = np.roll(matrix, 1, axis=1).diagonal().mean()  # every concept compared with another's references
    return (
        f"## The judge\n\nIt tells {identity['reliability']:.0%} of the reference pictures apart. Similarity to their "
        f"references: concepts drawn alone {np.mean(identity['alone']):.2f}, the base's nouns "
        f"{np.mean(identity['floor']):.2f}. Control, with the names swapped: crops of pairs have "
        f"{swapped:.2f} to the wrong concept's references, "
        f"{matrix.diagonal().mean():.2f} to their own."
    )


def matrices(full: Sequence[dict[str, Any]], folder: Path | None) -> str:
    shown = ("spectral", "spectral, places found", "spectral-quiet", "lora, direct_sum", "lora, composite")
    rows = {s["arm"]: (s["concepts"], s["identity"]["matrix"]) for s in full if s["arm"] in shown}
    if folder is None or not rows:
        return ""
    plots.write(figures.matrices(rows), folder / "fusion-bench-matrices.png")
    return (
        "## Which concept is in which crop\n\nSimilarity of the crop that should show a concept to every concept's "
        "references, in pictures of two.\n\n![Identity matrices](fusion-bench-matrices.png)"
    )


def sheet(laboratory: Laboratory, names: tuple[str, ...], full: Sequence[dict[str, Any]], folder: Path | None) -> str:
    if folder is None:
        return ""
    scored = {score["arm"] for score in full}
    write_sheet(laboratory, names, [arm for arm in SHEET_ARMS if arm in scored], folder / "fusion-bench-sheet.jpg")
    return (
        "## In pictures\n\nThe same prompts and seed, nothing picked; all concepts fused in every row.\n\n"
        "![One row an arm](fusion-bench-sheet.jpg)"
    )


def write_sheet(laboratory: Laboratory, names: tuple[str, ...], shown: Sequence[str], file: Path) -> None:
    """Four concepts alone, three pairs and two prompts without concepts, a row of pictures for every arm."""
    subjects = concepts(names)
    templates, tokens = laboratory.prompts, [concept.token for concept in subjects[:4]]
    prompts = [templates.single.format(first=token) for token in tokens]
    prompts += [templates.pair.format(first=one, second=two) for one, two in pairwise(tokens)]
    prompts += templates.free[:2]
    rows = {}
    for arm in shown:
        files = laboratory.files(arms()[arm].recipe, subjects)
        draw = laboratory.together(arm, subjects, files)
        rows[arm] = [draw(prompt, laboratory.seeds[0]) for prompt in prompts]
    titles = [*tokens, *(f"{one}\n{two}" for one, two in pairwise(tokens)), "no concept", "no concept"]
    figures.sheet(rows, titles).savefig(file, dpi=100, pil_kwargs={"quality": 88})


def predictions(predicted: dict[str, Any], folder: Path | None) -> str:
    if not predicted:
        return ""
    rows: list[list[str]] = []
    for recipe, pairs in predicted.items():
        known = [pair for pair in pairs if pair["foreseen"] is not None]
        lost = [pair["lost"] for pair in known]
        predictors = ([pair[key] for pair in known] for key in ("heard", "foreseen"))
        halves = ([pair["halves"][k] for pair in known] for k in (0, 1))
        correlations = [prediction.rank_correlation(values, lost) for values in predictors]
        correlations.append(prediction.rank_correlation(*halves))
        rows.append([recipe, f"{len(known)} of {len(pairs)}", *map(number, correlations)])
    if folder:
        plots.write(figures.scatter(predicted), folder / "fusion-bench-prediction.png")
    heading = table(("recipe", "ordered pairs", "cross-talk", "first step", "halves of the seeds"), rows)
    return (
        "## Predicted before anything is drawn\n\nThe share of its identity that concept j loses in pictures with i's "
        "adapter added ungated, by its rank correlation over ordered pairs: with cross-talk ‖ΔWᵢ Xⱼ‖ / ‖ΔWⱼ Xⱼ‖, from "
        "weights and inputs (`fusion.cross_talk`); with the share predicted from the UNet's first step "
        f"(`fusion.forecast`); and between halves of the seeds, which no prediction could exceed.\n\n{heading}"
        + ("\n\n![Prediction](fusion-bench-prediction.png)" if folder else "")
    )
