"""Slices: who owns which directions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.errors import SliceConflict
from fusion.spectral.slices import SpectralSlice, free_slice

slices = st.builds(SpectralSlice, st.integers(0, 30), st.integers(1, 9), st.integers(1, 9))
fast = settings(max_examples=100, deadline=None, derandomize=True)


@fast
@given(slices)
def test_a_slice_survives_json_and_counts_its_directions(part):
    assert SpectralSlice.from_json(part.to_json()) == part
    assert len(part.indices) == part.rank and part.indices[0] == part.start and part.indices[-1] + 1 == part.stop


@fast
@given(slices, slices)
def test_overlap_is_the_common_directions_from_both_sides(one, two):
    assert one.overlap(two) == two.overlap(one) == tuple(sorted(set(one.indices) & set(two.indices)))


@fast
@given(k=st.integers(0, 20), j=st.integers(0, 20), rank=st.integers(1, 8))
def test_contiguous_slices_are_disjoint_blocks(k, j, rank):
    one, two = SpectralSlice.contiguous(k, rank), SpectralSlice.contiguous(j, rank)
    assert list(one.indices) == list(range(k * rank, (k + 1) * rank))
    assert bool(one.overlap(two)) == (k == j)


@fast
@given(slots=st.integers(1, 9), rank=st.integers(1, 8))
def test_strided_slices_share_out_the_head_of_the_spectrum(slots, rank):
    parts = [SpectralSlice.strided(k, rank, slots) for k in range(slots)]
    assert sorted(i for part in parts for i in part.indices) == list(range(slots * rank))


@fast
@given(
    taken=st.lists(slices, max_size=5),
    rank=st.integers(1, 6),
    capacity=st.integers(1, 40),
    layout=st.sampled_from(["contiguous", "strided"]),
)
def test_a_free_slice_fits_and_overlaps_nobody_or_there_is_none(taken, rank, capacity, layout):
    candidates = (
        [SpectralSlice.strided(k, rank, 4) for k in range(4)]
        if layout == "strided"
        else [SpectralSlice.contiguous(k, rank) for k in range(40)]
    )
    fitting = [c for c in candidates if c.stop <= capacity and not any(c.overlap(t) for t in taken)]
    if fitting:
        assert free_slice(taken, rank, capacity=capacity, layout=layout, slots=4) == fitting[0]
    else:
        with pytest.raises(SliceConflict, match=f"rank {rank} .*{len(taken)} are taken.*{capacity} directions"):
            free_slice(taken, rank, capacity=capacity, layout=layout, slots=4)


@pytest.mark.parametrize("values", [(-1, 4, 1), (0, 0, 1), (0, 4, 0)])
def test_impossible_slices_are_refused(values):
    with pytest.raises(SliceConflict, match="start >= 0, rank >= 1 and step >= 1"):
        SpectralSlice(*values)


def test_a_slot_beyond_the_last_is_refused():
    with pytest.raises(SliceConflict, match=r"Slice 8 .* 8 strided slots; the last is 7"):
        SpectralSlice.strided(8, 4, 8)


def test_slices_read_like_ranges():
    assert str(SpectralSlice.contiguous(1, 8)) == "8-15"
    assert str(SpectralSlice(5, 1)) == str(SpectralSlice(5, 1, 3)) == "5"
    assert str(SpectralSlice.strided(1, 8, 8)) == "1-57 step 8"
