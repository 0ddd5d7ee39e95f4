"""A figure for people: which directions each adapter owns, and how much two adapters change the same thing.

Takes names, slices and numbers, and changes no global state of matplotlib. The colours are distinct with every kind of
colour vision (Okabe and Ito; a blue-orange scale), and nothing is expressed by colour alone.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fusion.output_files import MARK, check_output, write_output
from fusion.spectral.slices import SpectralSlice

GREY, LIGHT_GREY = "#6b6b6b", "#ededed"
OWNED: dict[str, Any] = {"color": "#0072b2", "label": "owned by one"}
SHARED: dict[str, Any] = {"color": "#d55e00", "label": "by several", "hatch": "////"}
DIVERGING = LinearSegmentedColormap.from_list(
    "opposed", ["#b35806", "#f6a75c", "#ffffff", "#7fb2da", "#08519c"]
).with_extremes(bad=LIGHT_GREY)
MARKS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}  # endings, and where this program names itself
MIN_LIMIT = 0.3  # of the cosine scale, so that small cosines look small
STYLE: dict[Any, Any] = {
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": GREY,
    "svg.fonttype": "none",
}


def overview(
    names: Sequence[str],
    slices: Sequence[Sequence[SpectralSlice]],
    cosine: Sequence[Sequence[float]],
    *,
    capacity: int | None = None,
) -> Figure:
    """The slices of N adapters and, for several, the (N, N) cosines between their changes ΔWᵢ, ΔWⱼ beside them.

    `capacity`: how many directions the narrowest layer has.
    """
    side = 2.6 + 0.5 * len(names)
    with rc_context(STYLE):
        if len(names) == 1:
            figure = Figure(figsize=(7.5, 2.1), layout="constrained")
            _draw_slices(figure.add_subplot(), names, slices, capacity)
        else:
            figure = Figure(figsize=(8 + side, side), layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=(8, side))
            _draw_slices(left, names, slices, capacity)
            _draw_cosines(right, names, cosine)
    return figure


def write(figure: Figure, path: str | Path, *, dpi: int = 160, overwrite: bool = False) -> Path:
    """Save as PNG, SVG or PDF, by the name's ending; an earlier plot is replaced, other files with `overwrite` only.

    Raises OutputError.
    """
    target, data = check_output(path, endings=tuple(MARKS), overwrite=overwrite), io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(data, dpi=dpi, format=target.suffix[1:].lower(), metadata={MARKS[target.suffix.lower()]: MARK})
    return write_output(target, data.getbuffer())


def _draw_slices(
    axes: Axes, names: Sequence[str], slices: Sequence[Sequence[SpectralSlice]], capacity: int | None
) -> None:
    """One bar a row; directions of several adapters are hatched."""
    cells = [(row, index) for row, parts in enumerate(slices) for index in {i for part in parts for i in part.indices}]
    owners = Counter(index for _, index in cells)
    used = max(owners, default=0) + 1
    end = max(used, min(max(2 * used, 16), capacity or math.inf))  # room for as many again, within the narrowest layer
    axes.barh(range(len(names)), end, 0.6, color=LIGHT_GREY)
    for style, shared in ((OWNED, False), (SHARED, True)):
        if bars := [cell for cell in cells if (owners[cell[1]] > 1) == shared]:
            rows, starts = zip(*bars, strict=True)
            axes.barh(rows, 1, 0.6, left=starts, edgecolor="white", linewidth=0.8, **style)
    for row in (row for row, parts in enumerate(slices) if not parts):
        axes.text(end / 2, row, "owns no directions", ha="center", va="center", color=GREY, fontsize=9)
    axes.set(xlim=(0, end), ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
    axes.set_xticks(range(0, int(end) + 1, max(1, 2 ** round(math.log2(end / 8)))))
    limit = f"; the narrowest layer has {capacity}" if capacity else ""
    axes.set(title="Slices: directions owned", xlabel=f"singular direction, 0 = largest{limit}")
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    if len(owners) < len(cells):
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)


def _draw_cosines(axes: Axes, names: Sequence[str], cosine: Sequence[Sequence[float]]) -> None:
    count = len(names)
    cells = np.where(np.eye(count, dtype=bool), np.nan, cosine)
    limit = max(MIN_LIMIT, np.nanmax(np.abs(cells)))
    picture = axes.imshow(cells, cmap=DIVERGING, vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(cells):
        text, colour = ("1", GREY) if i == j else (f"{value:+.2f}", "white" if abs(value) > 0.65 * limit else "black")
        axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set(title="Interference: cosine of ΔW", xticks=range(count), yticks=range(count), yticklabels=names)
    axes.set_xticklabels(names, rotation=35, ha="right", rotation_mode="anchor")
    axes.hlines(np.arange(1, count) - 0.5, -0.5, count - 0.5, color="white", linewidth=2)
    axes.vlines(np.arange(1, count) - 0.5, -0.5, count - 0.5, color="white", linewidth=2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.85, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"−{limit:.2f}  opposed", "0  independent", f"+{limit:.2f}  alike"], fontsize=9)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
