"""Scores become docs/fusion-bench.md, its figures beside it."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.laboratory import figures, prediction, rates
from benchmarks.laboratory.arms import CONTROLS, arms
from benchmarks.laboratory.concepts import NAMES, concepts
from benchmarks.laboratory.plan import ALIKE, CURVE, Plan
from benchmarks.laboratory.scoring import Laboratory
from benchmarks.laboratory.store import Missing
from benchmarks.laboratory.teaching import RATE
from fusion.evaluation import plots
from fusion.evaluation.identity import RESAMPLES

CONCLUSIONS = Path(__file__).with_name("conclusions.md")  # written by people who have looked
SHOWN = (
    *("spectral", "spectral, places found", "spectral-gated-quiet", "spectral-gated-quiet, places found", "lora-gated"),
    *("spectral-open", "spectral-same", "orthogonal", "spectral-quiet", "lora-quiet"),
    *("spectral, exported", "spectral-gated-quiet, exported"),
    *("lora, direct_sum", "lora, average", "lora, ties", "lora, regression", "lora, switch", "lora, composite"),
)

LEGEND = """\
Retention: likeness to the references by the judge, 1 as drawn by its adapter alone, 0 as the base draws the noun, all
concepts pooled; with the 95 % bootstrap interval over concepts. Leakage: likeness to the *other* concepts, above what
the adapter alone shows. Beside: retention beside an ordinary thing. Missing: share of crops of pairs in which the
concept is not there.
Drift: 1 − cosine to the base's own picture, on prompts without any concept, and on the concepts' plain nouns.
UNet error: 0 says the same as the adapter alone, 1 as far off as the concept's own effect is large."""


def kept(now: Sequence[float], alone: Sequence[float]) -> tuple[float, str]:
    """What is left of what adapters add to their nouns: sum over sum, so that a concept that is hardly drawn decides
    nothing; and in words, with the 95 % bootstrap interval over concepts."""
    if not len(now):
        return float("nan"), "–"
    parts = np.stack([np.asarray(now), np.asarray(alone)])
    picks = torch.randint(len(now), (RESAMPLES, len(now)), generator=torch.Generator().manual_seed(0)).numpy()
    above, below = parts[:, picks].sum(axis=2)
    low, high = np.quantile(above / below, [0.025, 0.975])
    whole = float(parts[0].sum() / parts[1].sum())
    return whole, f"{whole:.2f} ({low:.2f} to {high:.2f})"


def kept_alone(seen: dict[str, Any]) -> tuple[float, str]:
    """Retention in pictures of one concept."""
    gaps = np.subtract(seen["alone"], seen["floor"])
    return kept(gaps * [entry["mean"] for entry in seen["retention"]], gaps)


def kept_in_pairs(seen: dict[str, Any]) -> tuple[float, str]:
    if not seen["pair_retention"]:
        return kept((), ())
    there, lost = (np.diagonal(seen[key]) for key in ("matrix", "leakage"))
    return kept(there - seen["floor"], there - lost - seen["floor"])


def off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """The mean of what others gain, 0 for one concept."""
    values = np.asarray(matrix)[~np.eye(len(matrix), dtype=bool)]
    return float(values.clip(min=0).mean()) if len(values) else 0.0


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def row_of(score: dict[str, Any]) -> list[str]:
    seen = score["identity"]
    error = float(np.mean(score["error"])) if "error" in score else None
    return [
        score["arm"],
        kept_alone(seen)[1],
        number(off_diagonal(seen["single_leakage"]), 3),
        kept_in_pairs(seen)[1],
        number(off_diagonal(seen["leakage"]), 3),
        f"{seen['omission']:.0%}" if seen["pair_retention"] else "–",
        number(kept(*([row[key] for row in score["beside"]] for key in ("now", "alone")))[0]),
        number(score["drift"], 3),
        number(score["nouns"], 3),
        number(error),
        f"{score['ready_seconds']:.1f}",
        f"{score['picture_seconds']:.1f}",
        f"{score['bytes'] / 1e6:.1f}" if "bytes" in score else "–",
    ]


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
    folder = output.parent if output else None
    parts = [
        "# Which way of using several concepts together keeps them apart",
        CONCLUSIONS.read_text(encoding="utf-8").strip() if CONCLUSIONS.exists() and output else "",
        setting(laboratory, plan, main),
        f"## {len(main)} concepts at once\n\n{LEGEND}\n\n{table(HEADINGS, [row_of(score) for score in full])}",
        described(full),
        alike(scored),
        controls(scored),
        searched(laboratory, plan),
        curves(scored, folder),
        judged(full),
        matrices(full, folder),
        sheet(laboratory, main, full, folder),
        prophecy(predicted, folder),
        f"Not measured yet: {'; '.join(missing)}." if missing else "",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
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
            "the half of the picture where a concept was asked for. `make bench-fusion` redoes only what changed.",
        ]
    )


def described(full: Sequence[dict[str, Any]]) -> str:
    return table(("arm", "what it is"), [(score["arm"], arms()[score["arm"]].about) for score in full])


def alike(scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]]) -> str:
    rows = [row_of(score) for (_, names), score in scored.items() if names == ALIKE]
    return f"## Look-alikes: {', '.join(ALIKE)}\n\n{table(HEADINGS, rows)}" if rows else ""


def controls(scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]]) -> str:
    """Controls beside what they must equal, or must not, on fewer concepts."""
    sets = [names for (arm, names) in scored if arm in CONTROLS]
    if not sets:
        return ""
    compared = ("spectral-open", "spectral-same", "lora, direct_sum", *CONTROLS)
    rows = [row_of(scored[arm, sets[0]]) for arm in compared if (arm, sets[0]) in scored]
    return f"## Controls of the ungated sum: {', '.join(sets[0])}\n\n{table(HEADINGS, rows)}"


def searched(laboratory: Laboratory, plan: Plan) -> str:
    if not plan.searched:
        return ""
    found = {name: rates.search(laboratory, name, plan.tried) for name in plan.searched}
    rows = [
        [name, *(number(value, 3) for value in row.values()), f"{rates.best(row):g}"] for name, row in found.items()
    ]
    return (
        "## Learning rates\n\nLikeness to their references of two concepts drawn alone, at three rates. The base's own "
        "rate is kept unless another is better by 0.02.\n\n"
        + table(("recipe", *(f"{rate:g}" for rate in rates.RATES), "taken"), rows)
    )


def curves(scored: dict[tuple[str, tuple[str, ...]], dict[str, Any]], folder: Path | None) -> str:
    lines: dict[str, dict[int, tuple[float, float]]] = {}
    for (arm, names), score in scored.items():
        if arm in CURVE and names == NAMES[: len(names)]:
            seen = score["identity"]
            lines.setdefault(arm, {})[len(names)] = kept_alone(seen)[0], off_diagonal(seen["single_leakage"])
    counts = sorted({n for points in lines.values() for n in points})
    if len(counts) < 2:
        return ""
    rows = [[arm, *(f"{p[n][0]:.2f} / {p[n][1]:.3f}" if n in p else "–" for n in counts)] for arm, p in lines.items()]
    if folder:
        plots.write(figures.curves(lines), folder / "fusion-bench-curves.png")
    heading = table(("retention / leakage", *(f"N = {n}" for n in counts)), rows)
    return f"## More and more concepts\n\n![Retention and leakage](fusion-bench-curves.png)\n\n{heading}"


def judged(full: Sequence[dict[str, Any]]) -> str:
    """How far the judge is to be believed: its own errors, and a control."""
    seen = full[0]["identity"]
    matrix = np.asarray(seen["matrix"])
    swapped = np.roll(matrix, 1, axis=1).diagonal().mean()  # every concept held against another's references
    return (
        f"## The judge\n\nIt tells {seen['reliability']:.0%} of the reference pictures apart. Concepts drawn alone are "
        f"{np.mean(seen['alone']):.2f} like their references, the base's nouns {np.mean(seen['floor']):.2f}. Control, "
        f"names swapped around: crops of pairs are {swapped:.2f} like the wrong concept's references, "
        f"{matrix.diagonal().mean():.2f} like their own."
    )


def matrices(full: Sequence[dict[str, Any]], folder: Path | None) -> str:
    wanted = ("spectral", "spectral, places found", "spectral-quiet", "lora, direct_sum", "lora, composite")
    found = {s["arm"]: (s["concepts"], s["identity"]["matrix"]) for s in full if s["arm"] in wanted}
    if folder is None or not found:
        return ""
    plots.write(figures.matrices(found), folder / "fusion-bench-matrices.png")
    return (
        "## Who is in whose place\n\nLikeness of the crop where a concept was asked for to every concept's references, "
        "in pictures of two.\n\n![Identity matrices](fusion-bench-matrices.png)"
    )


def sheet(laboratory: Laboratory, names: tuple[str, ...], full: Sequence[dict[str, Any]], folder: Path | None) -> str:
    if folder is None:
        return ""
    chosen, there = concepts(names), {score["arm"] for score in full}
    tokens = [concept.token for concept in chosen]
    asked, several = laboratory.prompts, tokens[:4]
    prompts = [asked.single.format(first=token) for token in several]
    prompts += [asked.pair.format(first=one, second=two) for one, two in pairwise(several)]
    prompts += asked.free[:2]
    rows = {}
    for arm in (name for name in SHOWN if name in there):
        files = laboratory.files(arms()[arm].recipe, chosen)
        draw = laboratory.together(arm, chosen, files)
        rows[arm] = [draw(prompt, laboratory.seeds[0]) for prompt in prompts]
    titles = [*several, *(f"{one}\n{two}" for one, two in pairwise(several)), "no concept", "no concept"]
    figure = figures.sheet(rows, titles)
    figure.savefig(folder / "fusion-bench-sheet.jpg", dpi=100, pil_kwargs={"quality": 88})
    return (
        "## In pictures\n\nThe same prompts and seed, nothing picked; all concepts fused in every row.\n\n"
        "![One row an arm](fusion-bench-sheet.jpg)"
    )


def prophecy(predicted: dict[str, Any], folder: Path | None) -> str:
    if not predicted:
        return ""
    rows: list[list[str]] = []
    for recipe, pairs in predicted.items():
        known = [pair for pair in pairs if pair["foreseen"] is not None]
        lost = [pair["lost"] for pair in known]
        said = ([pair[key] for pair in known] for key in ("heard", "foreseen"))
        halves = ([pair["halves"][k] for pair in known] for k in (0, 1))
        agree = [prediction.rank_correlation(values, lost) for values in said]
        agree.append(prediction.rank_correlation(*halves))
        rows.append([recipe, f"{len(known)} of {len(pairs)}", *map(number, agree)])
    if folder:
        plots.write(figures.scatter(predicted), folder / "fusion-bench-prediction.png")
    heading = table(("recipe", "ordered pairs", "heard", "foreseen", "halves of the seeds"), rows)
    return (
        "## Known before anything was drawn\n\nWhat share of its identity concept j loses in pictures with i's adapter "
        "added ungated, by rank correlation over ordered pairs: with cross-talk ‖ΔWᵢ Xⱼ‖ / ‖ΔWⱼ Xⱼ‖, heard in weights "
        "and inputs (`fusion.cross_talk`); with the share foreseen from the UNet's first step (`fusion.forecast`); and "
        f"between halves of the seeds, which is as much as anything could reach.\n\n{heading}"
        + ("\n\n![Prediction](fusion-bench-prediction.png)" if folder else "")
    )
