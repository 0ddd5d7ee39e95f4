"""Figures say what they are given: titled, labelled, readable without colour, in the file formats people use."""

import numpy as np
import pytest
from PIL import Image

from fusion.evaluation.plots import overview, write
from fusion.spectral.slices import SpectralSlice

SLICES = {
    "owl": [SpectralSlice.contiguous(0, 4)],
    "robot": [SpectralSlice.contiguous(1, 4)],
    "stripes": [SpectralSlice.strided(1, 3, 8)],
    "lora": [],
}
COSINE = [[1, 0.02, -0.4, 0], [0.02, 1, 0.1, 0], [-0.4, 0.1, 1, 0.05], [0, 0, 0.05, 1]]


def figure_of(slices, capacity=None):
    return overview(list(slices), list(slices.values()), np.eye(len(slices)).tolist(), capacity=capacity)


def owned(figure) -> list[tuple[int, int]]:
    """(row, direction) of every cell drawn as owned."""
    patches = figure.axes[0].patches
    return sorted((round(p.get_y() + 0.3), round(p.get_x())) for p in patches if p.get_width() == 1)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_slice_map_marks_every_direction_owned():
    figure = figure_of(SLICES, capacity=64)
    rows = [sorted({i for part in parts for i in part.indices}) for parts in SLICES.values()]
    assert owned(figure) == [(row, index) for row, indices in enumerate(rows) for index in indices]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(SLICES)
    assert "owns no directions" in texts(figure.axes[0])


def test_shared_directions_are_hatched_not_only_coloured():
    shared = {"a": [SpectralSlice(0, 4)], "b": [SpectralSlice(2, 4)]}
    hatched = [p for p in figure_of(shared).axes[0].patches if p.get_hatch()]
    assert sorted(round(p.get_x()) for p in hatched) == [2, 2, 3, 3]


@pytest.mark.parametrize("capacity", [8, 40, None])
def test_the_axis_stays_within_the_narrowest_layer(capacity):
    figure = figure_of({"a": [SpectralSlice(4, 4)]}, capacity=capacity)
    assert figure.axes[0].get_xlim()[1] == (8 if capacity == 8 else 16)


def test_the_matrix_prints_its_numbers():
    axes = overview(list(SLICES), list(SLICES.values()), COSINE).axes[1]
    said = [["1" if i == j else f"{value:+.2f}" for j, value in enumerate(row)] for i, row in enumerate(COSINE)]
    assert texts(axes) == [text for row in said for text in row]


def test_one_adapter_has_nothing_to_interfere_with():
    assert len(figure_of({"a": [SpectralSlice(0, 4)]}).axes) == 1


def test_every_axis_has_a_title():
    assert all(axes.get_title(loc="left") for axes in figure_of(SLICES, capacity=64).axes[:2])


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_figures_are_written_by_ending(tmp_path, ending):
    path = write(figure_of(SLICES), tmp_path / f"new/map.{ending}")
    assert path.stat().st_size > 1000
    if ending == "png":
        corner = Image.open(path).convert("RGB").getpixel((0, 0))
        assert corner == (255, 255, 255)


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure_of(SLICES)
    assert dict(matplotlib.rcParams) == before
