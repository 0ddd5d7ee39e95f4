"""compare: each cell has the numbers of its setting; gated concepts lose nothing."""

import numpy as np
import pytest

import fusion
import tiny
from fusion.errors import ConfigError
from trained import trained_adapter


@pytest.mark.usefixtures("few_steps")
def test_a_grid_is_drawn_row_by_row_with_its_numbers():
    pipe = tiny.pipeline("sd1")
    adapters = [trained_adapter(pipe, "<rex>"), trained_adapter(pipe, "<tom>", k=1)]
    options = {"strengths": [0.0, 1.0], "alone": True}
    cells = list(fusion.compare(pipe, adapters, "a <rex>", num_inference_steps=2, **options))
    assert [(cell.number, cell.total, cell.strength) for cell in cells] == [(n, 6, float(n > 3)) for n in range(1, 7)]
    assert [cell.column for cell in cells[:3]] == ["direct_sum", "<rex> alone", "<tom> alone"]
    assert [cell.retention for cell in cells[3:]] == [{"<rex>": 1.0, "<tom>": 1.0}, {"<rex>": 1.0}, {"<tom>": 1.0}]
    assert all(share < 1e-3 for cell in cells[:3] for share in cell.retention.values())  # at strength 0 nothing is left
    assert all(cell.leakage == 0 and cell.picture.recipe.config.num_inference_steps == 2 for cell in cells)
    with pytest.warns(FutureWarning, match="Cell.retention"):
        assert cells[3].kept == cells[3].retention
    with pytest.warns(FutureWarning, match="num_inference_steps"):
        former = list(fusion.compare(pipe, adapters, "a <rex>", steps=2, **options))
    assert all(np.array_equal(a.picture.image, b.picture.image) for a, b in zip(cells, former, strict=True))


def test_an_empty_grid_is_refused():
    with pytest.raises(ConfigError, match="1 to 64 pictures, not 0"):
        next(fusion.compare(tiny.pipeline("sd1"), [], "a dog"))
