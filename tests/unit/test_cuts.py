"""A cut of the tokens that is not Megatron's is called by its name, on every context-parallel rank."""

import numpy as np
import pytest

from r3_adapter.layout import CpCut, Packing, ParallelLayout, local_segments
from r3_adapter.megatron.inputs import name_cut
from r3_adapter.reference import tokens_of_cp_rank
from r3_adapter.trace import RoutingTrace

LENGTHS = (19, 24, 13)


def traces() -> list[RoutingTrace]:
    """Return traces of other tokens each; a padded length of 24 pads two of them."""
    found, start = [], 1
    for length in LENGTHS:
        ids, zeros = np.zeros((length, 1, 1), np.uint8), np.zeros(length, np.int32)
        tokens = np.arange(start, start + length, dtype=np.int32)
        found.append(RoutingTrace(ids, tokens, zeros, np.zeros(1, np.int32), 2, ("v",)))
        start += length
    return found


def grid() -> np.ndarray:
    """Return [3, 24] the padded tokens."""
    found = np.zeros((3, 24), np.int64)
    for row, trace in zip(found, traces(), strict=True):
        row[: trace.num_tokens] = trace.token_ids
    return found


CASES = [(cp, rank) for cp in (2, 3, 4) for rank in range(cp)]


@pytest.mark.parametrize(("cp", "rank"), CASES)
def test_cuts_of_a_padded_batch(cp: int, rank: int) -> None:
    packing, layout = Packing.padded(3, 24), ParallelLayout(cp=cp)
    says = name_cut(traces(), np.split(grid(), cp, axis=1)[rank], packing, layout, rank)
    assert says == (
        f"these tokens are cut contiguously; replay expects Megatron's zigzag cut, where cp rank {rank} of {cp} has "
        f"chunks {rank} and {2 * cp - 1 - rank} of {2 * cp} of each sample"
    )
    assert "cut token by token in turns;" in name_cut(traces(), grid()[:, rank::cp], packing, layout, rank)
    chunks = np.split(grid(), 2 * cp, axis=1)
    other = (rank + 1) % cp
    theirs = np.concatenate([chunks[other], chunks[2 * cp - 1 - other]], axis=1)
    # The middle chunks of an odd number of ranks are one piece.
    name = "contiguously" if (cp, rank) == (3, 1) else f"for cp rank {other}"
    assert f"cut {name};" in name_cut(traces(), theirs, packing, layout, rank)


@pytest.mark.parametrize(("cp", "rank"), CASES)
def test_cuts_of_a_packed_batch(cp: int, rank: int) -> None:
    packing, layout = Packing.packed([0, 24, 48, 72]), ParallelLayout(cp=cp)
    each = np.split(grid(), cp, axis=1)[rank].reshape(1, -1)
    assert "cut contiguously;" in name_cut(traces(), each, packing, layout, rank)
    whole = np.split(grid().reshape(1, -1), cp, axis=1)[rank]
    assert "cut contiguously, the packed stream as a whole;" in name_cut(traces(), whole, packing, layout, rank)


@pytest.mark.parametrize(("cp", "rank"), CASES)
def test_other_cuts_than_a_contiguous_one(cp: int, rank: int) -> None:
    layout, other = ParallelLayout(cp=cp), (rank + 1) % cp
    padded, stream = (Packing.padded(3, 24, cp_cut="contiguous"), Packing.packed([0, 24, 48, 72], cp_cut="contiguous"))
    chunks = np.split(grid(), 2 * cp, axis=1)
    zigzag = np.concatenate([chunks[rank], chunks[2 * cp - 1 - rank]], axis=1)
    # The middle chunks of an odd number of ranks are the interval.
    if (cp, rank) != (3, 1):
        assert name_cut(traces(), zigzag, padded, layout, rank) == (
            "these tokens are cut in Megatron's zigzag, two chunks of each sample; replay expects the packing's "
            f"contiguous cut, where cp rank {rank} of {cp} has part {rank} of each sample"
        )
    assert (
        f"zigzag, two chunks of each sample; replay expects the packing's contiguous cut, where cp rank {rank} of {cp} "
        f"has part {rank} of the packed stream as a whole"
        in name_cut(traces(), zigzag.reshape(1, -1), stream, layout, rank)
    )
    parts = np.split(grid(), cp, axis=1)
    assert (f"cut for cp rank {other};" if other else "or for cp rank 0;") in name_cut(
        traces(), parts[other], padded, layout, rank
    )
    if (cp, rank) != (3, 1):
        each = parts[rank].reshape(1, -1)
        assert "cut contiguously, sample by sample;" in name_cut(traces(), each, stream, layout, rank)


@pytest.mark.parametrize("cp_cut", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("cp", "rank"), CASES)
def test_the_cut_that_is_expected_has_no_name(cp: int, rank: int, cp_cut: CpCut) -> None:
    for packing in (Packing.padded(3, 24, cp_cut=cp_cut), Packing.packed([0, 24, 48, 72], cp_cut=cp_cut)):
        places = np.array(tokens_of_cp_rank(packing, cp, rank))
        rows = grid()[places[..., 0], places[..., 1]]
        assert name_cut(traces(), rows.T, packing, ParallelLayout(cp=cp), rank) == ""


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(cp=2)], ids=str)
def test_tokens_in_the_order_of_rows_are_named(layout: ParallelLayout) -> None:
    """As many tokens in a row of [b, s] as there are, but those of [s, b]."""
    packing = Packing.padded(3, 24)
    places = np.array(tokens_of_cp_rank(packing, layout.cp, 0))
    rows = grid()[places[..., 0], places[..., 1]]
    says = "these tokens lie in the order of Megatron's rows, s * b + i; replay takes input_ids, [b, s]"
    assert name_cut(traces(), rows.reshape(3, -1), packing, layout, 0) == says
    assert name_cut(traces()[:2], rows.reshape(3, -1), packing, layout, 0) == ""
    assert name_cut(traces(), rows.reshape(3, -1), Packing.padded(3, 12), layout, 0) == ""


@pytest.mark.parametrize(("cp", "rank"), CASES)
def test_what_is_in_no_known_order_has_no_name(cp: int, rank: int) -> None:
    packing, layout = Packing.padded(3, 24), ParallelLayout(cp=cp)
    tokens = np.random.default_rng(0).permuted(np.split(grid(), cp, axis=1)[rank], axis=1)
    assert name_cut(traces(), tokens, packing, layout, rank) == ""
    assert name_cut(traces(), grid(), packing, ParallelLayout(), 0) == ""


def test_the_right_cut_is_the_one_of_the_layout() -> None:
    """The names that are given to other cuts would be wrong if these were Megatron's chunks no more."""
    packing, layout = Packing.padded(3, 24), ParallelLayout(cp=3)
    places = local_segments(packing, layout, layout.coords(1))
    assert sorted({(pos, length) for _, pos, length, _, _ in places.tolist()}) == [(4, 4), (16, 4)]
