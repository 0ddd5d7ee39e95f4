"""Measures of interference agree with the dense matrices and stay within their bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.spectral.delta import Delta
from fusion.spectral.interference import cosines, energy_ratio, gram, retention, subspace_overlap


def some(count, seed=0, out=9, width=7, rank=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        Delta(torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator))
        for _ in range(count)
    ]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(count=st.integers(1, 4), seed=st.integers(0, 999))
def test_measures_agree_with_the_dense_changes(count, seed):
    deltas = some(count, seed)
    flat = torch.stack([delta.dense().double().flatten() for delta in deltas])
    matrix = gram(deltas)
    assert torch.allclose(matrix, flat @ flat.T, atol=1e-4)
    unit = flat / flat.norm(dim=1, keepdim=True)
    assert torch.allclose(cosines(matrix), unit @ unit.T, atol=1e-6)
    total = flat.sum(dim=0)
    assert torch.allclose(retention(matrix), (flat @ total) / flat.square().sum(dim=1), atol=1e-5)
    assert energy_ratio(matrix) == pytest.approx(float(total.norm() / flat.norm(dim=1).max()), rel=1e-5)


def test_a_missing_or_empty_change_interferes_with_nothing():
    delta = some(1)[0]
    matrix = gram([delta, None, Delta.zero(9, 7)])
    assert torch.equal(matrix[1:], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(cosines(matrix)[1:], torch.zeros(2, 3, dtype=torch.float64))
    assert retention(matrix).isfinite().all() and energy_ratio(matrix) == pytest.approx(1)
    assert energy_ratio(gram([None, None])) == 0


def test_one_change_fused_with_its_twin_and_its_opposite():
    delta = some(1)[0]
    assert torch.allclose(cosines(gram([delta, delta * -2]))[0, 1], torch.tensor(-1.0, dtype=torch.float64))
    assert torch.allclose(retention(gram([delta, delta])), torch.full((2,), 2.0, dtype=torch.float64))
    assert energy_ratio(gram([delta, delta * -1])) == pytest.approx(0, abs=1e-6)


def test_overlap_of_column_spans():
    basis = torch.linalg.qr(torch.randn(9, 6)).Q
    assert subspace_overlap(basis[:, :3], basis[:, 3:]) == pytest.approx(0, abs=1e-9)
    assert subspace_overlap(basis[:, :2], basis @ torch.randn(6, 6)) == pytest.approx(1, abs=1e-6)
    assert subspace_overlap(basis[:, :4], basis[:, 2:]) == pytest.approx(0.5, abs=1e-6)
    doubled = torch.cat([basis[:, :2], basis[:, :2]], dim=1)
    assert subspace_overlap(doubled, basis[:, :2]) == pytest.approx(1, abs=1e-6)
    assert subspace_overlap(torch.zeros(9, 3), basis) == subspace_overlap(basis[:, :0], basis) == 0
