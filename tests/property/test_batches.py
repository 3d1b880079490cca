"""The order of a packed micro-batch's tokens on context-parallel ranks, against the oracle."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from r3_adapter.layout import Packing
from r3_adapter.megatron.batches import packed_places
from r3_adapter.reference import tokens_of_cp_rank


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.sampled_from([1, 2, 3, 4]))
def test_places_are_the_oracles(rooms: list[int], cp: int) -> None:
    packing = Packing.packed(np.cumsum([0, *(2 * cp * room for room in rooms)]))
    for cp_rank in range(cp):
        want = np.array(tokens_of_cp_rank(packing, cp, cp_rank), np.int64).reshape(1, -1, 2)
        assert np.array_equal(packed_places(packing, cp, cp_rank), want)
