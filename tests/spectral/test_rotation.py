"""The Cayley map gives rotations, exact at and near the identity."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.spectral.rotation import cayley, cayley_offset


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rank=st.integers(1, 9), scale=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]), seed=st.integers(0, 999))
def test_every_matrix_gives_a_rotation_and_its_transpose_the_way_back(rank, scale, seed):
    X = scale * torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    R, eye = cayley(X), torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(R @ R.T, eye, atol=1e-8)
    assert torch.allclose(torch.linalg.det(R), torch.ones((), dtype=torch.float64), atol=1e-8)
    assert torch.allclose(cayley(X.T), R.T, atol=1e-8)


def test_the_offset_is_zero_at_zero_in_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        offset = cayley_offset(torch.zeros(5, 5, dtype=dtype))
        assert torch.equal(offset, torch.zeros(5, 5, dtype=offset.dtype))
        assert offset.dtype == torch.promote_types(dtype, torch.float32)


def test_tiny_rotations_keep_their_digits():
    X = 1e-6 * torch.randn(6, 6, dtype=torch.float64)
    exact = cayley_offset(X)
    assert (cayley_offset(X.float()).double() - exact).norm() < 1e-5 * exact.norm()


def test_only_the_skew_part_counts():
    X = torch.randn(6, 6, dtype=torch.float64)
    symmetric = X + X.T
    assert torch.allclose(cayley(X), cayley(X + symmetric), atol=1e-9)


def test_gradients_are_right_at_zero_and_away_from_it():
    for X in (torch.zeros(4, 4), torch.randn(4, 4)):
        assert torch.autograd.gradcheck(cayley_offset, X.double().requires_grad_())
