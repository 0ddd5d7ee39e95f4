"""Changes in factors do the linear algebra of the dense matrices they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.spectral.delta import Delta

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 6), st.integers(0, 6), st.integers(0, 999))
fast = settings(max_examples=60, deadline=None, derandomize=True)


def pair(sizes):
    out, width, first, second, seed = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return tuple(Delta(draw(out, rank), draw(rank, width)) for rank in (first, second))


@fast
@given(sizes, st.floats(-3, 3))
def test_factors_agree_with_dense_matrices(sizes, strength):
    one, two = pair(sizes)
    dense_one, dense_two = one.dense(), two.dense()
    assert one.shape == dense_one.shape and (one + two).rank == one.rank + two.rank
    assert torch.allclose((one + two).dense(), dense_one + dense_two)
    assert torch.allclose((one * strength).dense(), dense_one * strength)
    assert torch.allclose(one.inner(two), (dense_one * dense_two).sum())
    assert torch.allclose(one.norm(), dense_one.norm())


@fast
@given(sizes, st.integers(0, 8))
def test_compressing_to_a_rank_is_the_best_approximation_there_is(sizes, rank):
    one, two = pair(sizes)
    total = one + two
    small, dense = total.compress(rank=rank), total.dense()
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    assert small.rank <= rank or total.rank == 0
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert (dense - small.dense()).norm() <= (dense - best).norm() + 1e-9 * (1 + dense.norm())


@fast
@given(sizes, st.floats(0.05, 1.0))
def test_compressing_by_energy_keeps_that_share_at_the_least_rank(sizes, energy):
    one, two = pair(sizes)
    total = one + two
    small = total.compress(energy=energy)
    whole = total.inner(total)
    assert small.inner(small) >= (energy - 1e-9) * whole
    if small.rank > 1 and float(whole) > 1e-9:
        less = small.compress(rank=small.rank - 1)
        assert less.inner(less) < energy * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compression_keeps_the_dtype_and_loses_nothing_at_full_rank(dtype):
    delta = Delta(torch.randn(10, 3).to(dtype), torch.randn(3, 8).to(dtype))
    small = (delta + delta).compress()
    assert small.up.dtype == small.down.dtype == dtype
    dense = 2 * delta.dense().float()
    tolerance = 4 * torch.finfo(dtype).eps * float(dense.norm())
    assert (small.dense().float() - dense).norm() < tolerance
    assert (delta + delta).compress(energy=1 - 1e-6).rank == 3


def test_no_change_is_neutral():
    zero, delta = Delta.zero(10, 8), Delta(torch.randn(10, 3), torch.randn(3, 8))
    assert zero.rank == 0 and torch.equal(zero.dense(), torch.zeros(10, 8))
    assert torch.equal((zero + delta).dense(), delta.dense())
    assert float(zero.norm()) == 0 and zero.compress(rank=2).rank == 0
    assert delta * 1 is delta


def test_detaching_and_moving_keep_the_values():
    delta = Delta(torch.randn(4, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True))
    assert not delta.detach().up.requires_grad and not delta.detach().dense().requires_grad
    assert torch.equal(delta.to(dtype=torch.float64).to("cpu", torch.float32).dense(), delta.dense())
