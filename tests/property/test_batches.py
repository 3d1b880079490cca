"""The order of a micro-batch's tokens on context-parallel ranks, against the oracle."""

from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from r3_adapter.layout import CpCut, Packing
from r3_adapter.megatron.batches import packed_places, places_as_cut
from r3_adapter.reference import tokens_of_cp_rank


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(get_args(CpCut)),
)
def test_places_are_the_oracles(units: list[int], cp: int, cp_cut: CpCut) -> None:
    unit = 2 * cp if cp_cut == "zigzag" else 1
    lengths = [unit * number for number in units]
    packing = Packing.packed(np.cumsum([0, *lengths, -sum(lengths) % cp]), cp_cut=cp_cut)
    for cp_rank in range(cp):
        want = np.array(tokens_of_cp_rank(packing, cp, cp_rank), np.int64).reshape(1, -1, 2)
        assert np.array_equal(packed_places(packing, cp, cp_rank), want)
        assert np.array_equal(places_as_cut(packing, cp, cp_rank), want)


@given(st.integers(1, 4), st.integers(0, 4), st.sampled_from([1, 2, 3, 4]), st.sampled_from(get_args(CpCut)))
def test_padded_places_are_the_oracles(num_samples: int, parts: int, cp: int, cp_cut: CpCut) -> None:
    packing = Packing.padded(num_samples, 2 * cp * parts, cp_cut=cp_cut)
    for cp_rank in range(cp):
        rows = np.array(tokens_of_cp_rank(packing, cp, cp_rank), np.int64)
        want = rows.reshape(-1, num_samples, 2).swapaxes(0, 1)
        assert np.array_equal(places_as_cut(packing, cp, cp_rank), want)
