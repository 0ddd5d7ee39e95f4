"""The figures of the report. Lines and cells show their names and numbers: nothing is expressed by colour alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fusion.evaluation.plots import GREY, STYLE

# Okabe and Ito
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#8c564b",
    "#7f7f7f",
)  # Okabe, Ito
MARKERS = "osD^vP*X<"
HELD_OUT = {"one": ("one concept", "-"), "several": ("several", "--"), "drift": ("none", ":")}  # kinds of prompts


def curves(lines: Mapping[str, Mapping[int, tuple[float, float]]]) -> Figure:
    """Retention and leakage against the number of concepts; arm -> N -> (retention, leakage)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        every = sorted({n for points in lines.values() for n in points})
        for k, (title, label) in enumerate(
            (("Retention: 1 as alone, 0 as the base's noun", "retention"), ("Leakage of the others", "leakage"))
        ):
            axes = (left, right)[k]
            for row, (arm, points) in enumerate(lines.items()):
                style, index = divmod(row, len(COLOURS))
                counts = sorted(points)
                axes.plot(
                    counts,
                    [points[n][k] for n in counts],
                    color=COLOURS[index],
                    marker=MARKERS[index],
                    linestyle=("-", "--", ":")[style],
                    markersize=4.5 + 0.4 * row,  # larger further down, so that lines that coincide are all visible
                    zorder=100 - row,
                    label=arm,
                )
            axes.set_xscale("log", base=2)
            axes.set(title=title, xlabel="concepts used together", xticks=every, xticklabels=every, ylabel=label)
            _plain(axes)
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    return figure


def distillations(over_n: Mapping[str, Mapping[int, Mapping[str, float]]], over_rank: Mapping[int, Any]) -> Figure:
    """Held-out errors against the number of concepts, arm -> N -> errors, and against the rank, rank -> errors."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for k, (arm, points) in enumerate(over_n.items()):
            _errors(left, points, k, f"{arm.partition(',')[0]}, ")
        _errors(right, over_rank, 0, "")
        counts = sorted({n for points in over_n.values() for n in points})
        for axes, ticks, label in ((left, counts, "concepts in one file"), (right, sorted(over_rank), "rank")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set(xlabel=label, xticks=ticks, xticklabels=ticks)
            axes.minorticks_off()
            _plain(axes)
        left.set(ylabel="held-out error", title="Number of concepts")
        right.set(title="Rank, eight concepts")
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9, handlelength=3
        )
    return figure


def _errors(axes: Axes, points: Mapping[int, Mapping[str, float]], row: int, label: str) -> None:
    """A line for every kind of prompts."""
    for kind, (name, line) in HELD_OUT.items():
        steps = sorted(step for step in points if kind in points[step])
        values = [points[step][kind] for step in steps]
        axes.plot(
            steps, values, color=COLOURS[row], marker=MARKERS[row], linestyle=line, markersize=4.5, label=label + name
        )


def matrices(arms: Mapping[str, tuple[Sequence[str], Sequence[Sequence[float]]]]) -> Figure:
    """One identity matrix an arm: rows are crops, columns the concepts they are compared with."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(arms) + 0.8, 3.9), layout="constrained")
        panels = figure.subplots(1, len(arms), squeeze=False)[0]
        for axes, (arm, (names, matrix)) in zip(panels, arms.items(), strict=True):
            axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
            for (i, j), value in np.ndenumerate(np.asarray(matrix)):
                colour = "white" if value > 0.6 else "black"
                axes.text(j, i, f"{value:.1f}".replace("0.", "."), ha="center", va="center", fontsize=7, color=colour)
            axes.set(title=arm, xticks=range(len(names)), yticks=range(len(names)))
            axes.set_xticklabels(names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
            axes.set_yticklabels(names if axes is panels[0] else [], fontsize=8)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("crop of")
    return figure


def scatter(predicted: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Identity lost in pictures against its predictions, a point for every ordered pair; one row a recipe."""
    predictors = {
        "heard": "cross-talk, from weights and inputs",
        "foreseen": "share lost, from the first step",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(10.8, 3.8 * len(predicted)), layout="constrained")
        grid = figure.subplots(len(predicted), len(predictors), squeeze=False)
        for panels, (recipe, rows), colour in zip(grid, predicted.items(), COLOURS[: len(predicted)], strict=True):
            known = [row for row in rows if row["foreseen"] is not None]
            for axes, (key, label) in zip(panels, predictors.items(), strict=True):
                axes.scatter([row[key] for row in known], [row["lost"] for row in known], color=colour, s=18, alpha=0.8)
                axes.set(title=recipe, xlabel=label, ylabel="share lost in pictures")
                _plain(axes)
    return figure


def sheet(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str]) -> Figure:
    """The same prompts and seed, a row of pictures for every arm."""
    with rc_context(STYLE):
        figure = Figure(figsize=(1.25 * len(columns) + 2.4, 1.28 * len(rows) + 0.7), layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for line, (arm, pictures) in zip(grid, rows.items(), strict=True):
            for axes, picture in zip(line, pictures, strict=True):
                axes.imshow(picture)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(arm, rotation=0, ha="right", va="center", fontsize=8)
        for axes, words in zip(grid[0], columns, strict=True):
            axes.set_title(words, fontsize=7, fontweight="normal", loc="center", pad=4)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GREY)
