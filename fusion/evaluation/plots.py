"""Figures for people: which directions each adapter owns, and how much two adapters change the same thing.

Takes names, slices and numbers, knows neither files nor models, and touches no global state of matplotlib. Colours are
told apart by every kind of colour vision (Okabe and Ito; a blue-orange scale), and no statement rests on colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fusion.spectral.slices import SpectralSlice

INK, FAINT, GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"
OWNED, SHARED, NEUTRAL = "#0072b2", "#d55e00", "#ededed"
DIVERGING = LinearSegmentedColormap.from_list("opposed", ["#b35806", "#f6a75c", "#ffffff", "#7fb2da", "#08519c"])
CALM = 0.3  # the cosine scale spans at least this much, so that noise looks like noise
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
}


def slice_map(slices: Mapping[str, Sequence[SpectralSlice]], *, capacity: int | None = None) -> Figure:
    """Which singular directions each adapter owns; directions that two of them own stand out.

    `capacity`: how many directions the narrowest layer has.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.7 + 0.36 * len(slices)), layout="constrained")
        _draw_slices(figure.add_subplot(), slices, capacity)
    return figure


def interference_matrix(names: Sequence[str], cosine: Sequence[Sequence[float]]) -> Figure:
    """The cosine between every two changes ΔWᵢ, ΔWⱼ as an (N, N) table in colours."""
    with rc_context(STYLE):
        side = 2.6 + 0.55 * len(names)
        figure = Figure(figsize=(side + 1.2, side), layout="constrained")
        _draw_cosines(figure.add_subplot(), names, cosine)
    return figure


def overview(
    slices: Mapping[str, Sequence[SpectralSlice]],
    names: Sequence[str],
    cosine: Sequence[Sequence[float]],
    *,
    capacity: int | None = None,
) -> Figure:
    """Slice map and interference matrix side by side."""
    with rc_context(STYLE):
        height = 2.6 + 0.5 * max(len(names), len(slices))
        figure = Figure(figsize=(8 + height, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(8, height))
        _draw_slices(left, slices, capacity)
        _draw_cosines(right, names, cosine)
    return figure


def write(figure: Figure, path: str | Path) -> Path:
    """Save as PNG, SVG or PDF, by the name's ending."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure.savefig(target, dpi=160)
    return target


def _draw_slices(axes: Axes, slices: Mapping[str, Sequence[SpectralSlice]], capacity: int | None) -> None:
    owners: dict[int, int] = {}
    for owned in slices.values():
        for index in {i for part in owned for i in part.indices}:
            owners[index] = owners.get(index, 0) + 1
    end = _shown(max(owners, default=0) + 1, capacity)
    for row, owned in enumerate(slices.values()):
        axes.add_patch(Rectangle((0, row - 0.3), end, 0.6, facecolor=NEUTRAL, linewidth=0))
        for index in sorted({i for part in owned for i in part.indices}):
            shared = owners[index] > 1
            axes.add_patch(
                Rectangle(
                    (index, row - 0.3), 1, 0.6, facecolor=SHARED if shared else OWNED, edgecolor="white", linewidth=0.8,
                    hatch="////" if shared else None,
                )
            )  # fmt: skip
        if not owned:
            axes.text(end / 2, row, "owns no directions", ha="center", va="center", color=FAINT, fontsize=9)
    axes.set(xlim=(0, end), ylim=(len(slices) - 0.5, -0.5), yticks=range(len(slices)), yticklabels=list(slices))
    axes.set_xticks(range(0, end + 1, max(1, 2 ** round(math.log2(end / 8)))))
    limit = f"; the narrowest layer has {capacity}" if capacity else ""
    axes.set(title="Slices: directions owned", xlabel=f"singular direction, 0 = largest{limit}")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if any(count > 1 for count in owners.values()):
        key = [Patch(color=OWNED, label="owned by one"), Patch(fc=SHARED, ec="white", hatch="////", label="by several")]
        axes.legend(handles=key, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)


def _shown(used: int, capacity: int | None) -> int:
    """How far the axis runs: room for as many slices again as are taken, within the narrowest layer."""
    wanted = max(2 * used, 16)
    return max(used, min(wanted, capacity) if capacity else wanted)


def _draw_cosines(axes: Axes, names: Sequence[str], cosine: Sequence[Sequence[float]]) -> None:
    count = len(names)
    apart = [abs(cosine[i][j]) for i in range(count) for j in range(count) if i != j]
    limit = max([CALM, *apart])
    cells = [[0.0 if i == j else cosine[i][j] for j in range(count)] for i in range(count)]
    picture = axes.imshow(cells, cmap=DIVERGING, vmin=-limit, vmax=limit)
    for i in range(count):
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor=NEUTRAL, linewidth=0))
        for j in range(count):
            strong = i != j and abs(cosine[i][j]) > 0.65 * limit
            axes.text(
                j, i, "1" if i == j else f"{cosine[i][j]:+.2f}", ha="center", va="center", fontsize=9,
                color="white" if strong else FAINT if i == j else INK,
            )  # fmt: skip
    axes.set(xticks=range(count), yticks=range(count), yticklabels=list(names))
    axes.set_xticklabels(list(names), rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xticks([i - 0.5 for i in range(1, count)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, count)], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(title="Interference: cosine of ΔW")
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.85, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"−{limit:.2f}  opposed", "0  independent", f"+{limit:.2f}  alike"], fontsize=9)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
