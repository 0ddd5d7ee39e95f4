"""Singular directions: a true decomposition, the same on every call, and a fingerprint of the weight (law 1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.errors import SliceConflict
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum, decompose, residual, take

SHAPES = [(24, 24), (40, 24), (24, 40), (5, 1), (1, 5), (1, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def noisy(weight, share):
    """The weight with noise of `share` of its own size."""
    noise = torch.randn_like(weight)
    return weight + share * noise * weight.norm() / noise.norm()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(out=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES))
def test_a_decomposition_is_orthonormal_descending_complete_and_repeatable(out, width, seed, dtype):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    U, S, V = spectrum = decompose(weight)
    exact, eye = weight.to(S.dtype), torch.eye(min(out, width), dtype=S.dtype)
    assert torch.allclose(U.T @ U, eye, atol=1e-5) and torch.allclose(V.T @ V, eye, atol=1e-5)
    assert (S >= 0).all() and (S.diff() <= 0).all()
    assert ((U * S) @ V.T - exact).norm() <= 1e-5 * exact.norm()
    assert residual(exact, spectrum) < 1e-5
    assert all(torch.equal(*pair) for pair in zip(spectrum, decompose(weight.clone()), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_decomposed_in_float32(dtype):
    weight = torch.randn(24, 16).to(dtype)
    expected = decompose(weight.to(torch.promote_types(dtype, torch.float32)))
    for found, wanted in zip(decompose(weight), expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_follow_the_largest_entry_of_each_u(shape):
    U = decompose(torch.randn(shape)).U
    assert (U.gather(0, U.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_signs_do_not_depend_on_the_precision_of_the_solver():
    weight = torch.randn(32, 24)
    single, double = decompose(weight), decompose(weight.double())
    assert torch.allclose(single.U.double(), double.U, atol=1e-3)
    assert torch.allclose(single.V.double(), double.V, atol=1e-3)


@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4), torch.eye(4)])
def test_degenerate_weights_still_have_orthonormal_directions(weight):
    U, S, V = decompose(weight)
    assert torch.allclose(U.T @ U, torch.eye(4), atol=1e-5) and torch.allclose(V.T @ V, torch.eye(4), atol=1e-5)
    assert torch.allclose((U * S) @ V.T, weight, atol=1e-5)


def test_depth_keeps_the_first_directions():
    weight = torch.randn(20, 12)
    whole, head = decompose(weight), decompose(weight, depth=5)
    assert head.S.shape == (5,)
    assert all(torch.equal(h, w[..., :5]) for h, w in zip(head, whole, strict=True))


def test_taking_a_slice_picks_its_columns_as_a_copy():
    spectrum, part = decompose(torch.randn(20, 12)), SpectralSlice.strided(1, 3, 4)
    taken = take(spectrum, part)
    for small, whole in zip(taken, spectrum, strict=True):
        assert torch.equal(small, whole[..., [1, 5, 9]])
        before = whole.clone()
        small.fill_(7)
        assert torch.equal(whole, before)


def test_a_slice_beyond_the_spectrum_is_refused():
    with pytest.raises(SliceConflict, match=r"12-15.*16.*has 12"):
        take(decompose(torch.randn(20, 12)), SpectralSlice.contiguous(3, 4))


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_a_basis_recognises_its_weight_anywhere_in_the_spectrum(shape, k):
    weight = torch.randn(shape)
    basis = take(decompose(weight), SpectralSlice.contiguous(k, 4))
    assert residual(weight, basis) < 1e-5
    assert residual(weight.half(), basis) < 0.002 and residual(weight.bfloat16(), basis) < 0.02
    assert residual(noisy(weight, 0.01), basis) < 0.02
    assert 0.02 < residual(noisy(weight, 0.1), basis) < 0.3
    assert residual(torch.randn(shape), basis) > 0.6
    assert residual(weight.flip(0), basis) > 0.6


def test_residuals_do_not_depend_on_the_scale_of_the_weight():
    weight = torch.randn(24, 24)
    basis, far = decompose(weight, 4), noisy(weight, 0.05)
    scaled = Spectrum(basis.U, basis.S * 1e-3, basis.V)
    assert residual(far * 1e-3, scaled) == pytest.approx(residual(far, basis), rel=1e-3)


def test_a_residual_that_cannot_be_taken_is_infinite_and_a_zero_layer_fits_itself():
    basis = decompose(torch.randn(24, 16), 4)
    assert residual(torch.randn(16, 24), basis) == float("inf")
    assert residual(torch.full((24, 16), float("nan")), basis) == float("inf")
    assert residual(torch.randn(24, 16), Spectrum(basis.U * float("nan"), basis.S, basis.V)) == float("inf")
    assert residual(torch.zeros(24, 16), decompose(torch.zeros(24, 16), 4)) == 0
