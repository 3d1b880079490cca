import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from r3_adapter.errors import LayoutError
from r3_adapter.layout import Packing, ParallelLayout, local_num_tokens, local_segments
from r3_adapter.plan.preflight import check_gpus
from r3_adapter.repack import find_layers, whole_layers


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2))))
def test_ranks_fill_both_grids_once(sizes):
    tp, pp, cp, ep, etp = sizes
    layout = ParallelLayout.smallest(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
    coords = [layout.coords(rank) for rank in range(layout.world_size)]
    assert len({(c.tp_rank, c.cp_rank, c.dp_rank, c.pp_rank) for c in coords}) == layout.world_size
    assert len({(c.etp_rank, c.ep_rank, c.edp_rank, c.pp_rank) for c in coords}) == layout.world_size
    assert max(c.ep_rank for c in coords) == ep - 1


def test_expert_tensor_parallel_defaults_to_tensor_parallel():
    layout = ParallelLayout.smallest(tp=2, ep=2)
    assert (layout.etp, layout.dp, layout.world_size) == (2, 2, 4)


def test_impossible_layouts_are_refused():
    with pytest.raises(LayoutError, match=r"etp \* ep \(4\) does not divide tp \* cp \* dp \(2\)"):
        ParallelLayout(dp=2, ep=4)
    with pytest.raises(LayoutError, match=r"rank \(1\) outside world of 1"):
        ParallelLayout().coords(1)
    with pytest.raises(LayoutError, match=r"pp \(0\) < 1"):
        ParallelLayout(pp=0)


def rows_of(packing, layout, rank):
    """Return {local row: (sample, position)} that local_segments gives, and check that it is well formed."""
    segments = local_segments(packing, layout, layout.coords(rank))
    assert segments.dtype == np.int64 and segments.flags.c_contiguous and segments.shape[1] == 5
    rows = [
        (row + i * stride, (sample, pos + i))
        for sample, pos, length, row, stride in segments.tolist()
        for i in range(length)
    ]
    assert sorted(row for row, _ in rows) == list(range(local_num_tokens(packing, layout)))
    return dict(rows)


def test_a_padded_batch_interleaves_its_samples():
    assert local_segments(Packing.padded(2, 3), ParallelLayout(), ParallelLayout().coords(0)).tolist() == [
        [0, 0, 3, 0, 2],
        [1, 0, 3, 1, 2],
    ]


def test_context_parallel_ranks_get_a_chunk_from_both_ends():
    layout = ParallelLayout(cp=2)
    packing = Packing.padded(1, 8)
    assert [pos for _, pos in rows_of(packing, layout, 0).values()] == [0, 1, 6, 7]
    assert [pos for _, pos in rows_of(packing, layout, 1).values()] == [2, 3, 4, 5]


def test_packed_samples_are_cut_each_by_itself():
    layout = ParallelLayout(cp=2)
    packing = Packing.packed([0, 4, 4, 12])
    assert list(rows_of(packing, layout, 0).values()) == [(0, 0), (0, 3), (2, 0), (2, 1), (2, 6), (2, 7)]
    assert list(rows_of(packing, layout, 1).values()) == [(0, 1), (0, 2), (2, 2), (2, 3), (2, 4), (2, 5)]


def test_a_contiguous_cut_gives_each_rank_an_interval():
    layout = ParallelLayout(tp=2, cp=2)
    padded = Packing.padded(2, 4, cp_cut="contiguous")
    assert [rows_of(padded, layout, rank) for rank in (1, 2)] == [{0: (0, 1), 1: (1, 1)}, {0: (0, 2), 1: (1, 2)}]
    # The samples' lengths need not divide: the whole stream does, with its tail of padding.
    stream = Packing.packed([0, 3, 3, 10, 12], cp_cut="contiguous")
    assert [list(rows_of(stream, layout, rank).values()) for rank in range(4)] == [
        [(0, 0), (0, 1), (0, 2)],
        [(2, 0), (2, 1), (2, 2)],
        [(2, 3), (2, 4), (2, 5)],
        [(2, 6), (3, 0), (3, 1)],
    ]


def test_a_contiguous_cut_of_a_length_that_does_not_divide_is_refused():
    padded, stream = Packing.padded(2, 5, cp_cut="contiguous"), Packing.packed([0, 3, 10], cp_cut="contiguous")
    with pytest.raises(
        LayoutError, match=r"^cp \(2\) does not divide the 5 sequence rows of a micro-batch in sbhd, cut"
    ):
        local_num_tokens(padded, ParallelLayout(cp=2))
    with pytest.raises(
        LayoutError, match=r"^tp \(2\) does not divide the 5 sequence rows of a cp rank in thd, cut conti"
    ):
        local_num_tokens(stream, ParallelLayout(tp=2, cp=2))
    with pytest.raises(LayoutError, match=r"cp_cut 'zig-zag' is none of"):
        Packing.packed([0, 4], cp_cut="zig-zag")


def test_sequence_parallel_ranks_cut_the_rows_of_their_context_parallel_rank():
    layout = ParallelLayout(tp=2, cp=2)
    packing = Packing.padded(2, 8)
    assert rows_of(packing, layout, 0) == {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (1, 1)}
    assert rows_of(packing, layout, 1) == {0: (0, 6), 1: (1, 6), 2: (0, 7), 3: (1, 7)}
    assert rows_of(packing, layout, 3) == {0: (0, 4), 1: (1, 4), 2: (0, 5), 3: (1, 5)}
    packed = Packing.packed([0, 4, 12])
    assert list(rows_of(packed, layout, 0).values()) == [(0, 0), (0, 3), (1, 0)]
    assert list(rows_of(packed, layout, 1).values()) == [(1, 1), (1, 6), (1, 7)]


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 4), (1, 2), (1, 2, 3), (1, 2))))
@pytest.mark.parametrize("packing", [Packing.padded(3, 24), Packing.packed([0, 12, 12, 36, 48])])
def test_ranks_of_a_copy_share_every_token_once(sizes, packing):
    tp, pp, cp, dp = sizes
    layout = ParallelLayout(tp=tp, pp=pp, cp=cp, dp=dp, etp=1)
    every = sorted(
        (sample, pos) for sample, padded_length in enumerate(packing.padded_lengths) for pos in range(padded_length)
    )
    copies: dict = {}
    for rank in range(layout.world_size):
        place = layout.coords(rank)
        copies.setdefault((place.dp_rank, place.pp_rank), []).extend(rows_of(packing, layout, rank).values())
    assert len(copies) == dp * pp
    assert all(sorted(tokens) == every for tokens in copies.values())


def test_packings_that_cannot_be_are_refused():
    cases = [
        (lambda: Packing.padded(0, 4), "a sbhd micro-batch without samples"),
        (lambda: Packing.packed([0]), "a thd micro-batch without samples"),
        (lambda: Packing.packed([]), r"cu_seqlens_padded \[\] does not begin with 0"),
        (lambda: Packing.packed([1, 4]), r"cu_seqlens_padded \[1, 4\] does not begin with 0"),
        (lambda: Packing.packed(np.array([0, 4, 3])), r"padded length \(-1\) of sample 1 < 0"),
        (lambda: Packing.padded(2, -4), r"padded length \(-4\) of sample 0 < 0"),
        (lambda: Packing("sbhd", (4, 5)), r"padded length \(5\) of sample 1 != 4 of sample 0 in sbhd"),
        (lambda: Packing("bshd", (4, 4)), "qkv_format 'bshd' is none of 'sbhd', 'thd'"),
    ]
    for make, message in cases:
        with pytest.raises(LayoutError, match=message):
            make()


def test_sizes_that_do_not_divide_are_refused():
    cases = [
        (Packing.padded(2, 6), ParallelLayout(cp=2), r"2 \* cp \(4\) does not divide padded length \(6\) of sample 0"),
        (Packing.packed([0, 4, 10]), ParallelLayout(cp=2), r"\(4\) does not divide padded length \(6\) of sample 1"),
        (Packing.padded(2, 3), ParallelLayout(tp=2), r"tp \(2\) does not divide the 3 sequence rows .* in sbhd"),
        (Packing.packed([0, 4, 8]), ParallelLayout(tp=8, cp=1), None),
        (Packing.packed([0, 4, 8]), ParallelLayout(tp=8, cp=2), r"tp \(8\) does not divide the 4 sequence rows"),
    ]
    for packing, layout, message in cases:
        if message is None:
            assert local_num_tokens(packing, layout) == 1
            continue
        with pytest.raises(LayoutError, match=message):
            local_num_tokens(packing, layout)
        with pytest.raises(LayoutError, match=message):
            local_segments(packing, layout, layout.coords(0))


WRONG = [2.0, 1.5, "2", None, True, np.True_, np.float32(2), [2], float("nan")]


@pytest.mark.parametrize("value", WRONG, ids=map(repr, WRONG))
@pytest.mark.parametrize("name", ["tp", "pp", "vpp", "cp", "ep", "etp", "dp"])
def test_sizes_that_are_no_whole_numbers_are_refused(name, value):
    if (name, value) == ("etp", None):
        return
    with pytest.raises(LayoutError, match=rf"^{name} \(.*\) is not a whole number$"):
        ParallelLayout(**{name: value})
    if name not in ("pp", "vpp"):
        with pytest.raises(LayoutError, match=rf"{name} \(.*\) is not a whole number$"):
            ParallelLayout.smallest(**{name: value})


@pytest.mark.parametrize("value", WRONG, ids=map(repr, WRONG))
def test_lengths_and_ranks_that_are_no_whole_numbers_are_refused(value):
    calls = [
        lambda: Packing.padded(value, 4),
        lambda: Packing.padded(2, value),
        lambda: Packing.packed([0, value]),
        lambda: Packing("thd", (4, value)),
        lambda: ParallelLayout(tp=2).coords(value),
        lambda: find_layers([value], np.array([2], np.int32)),
        lambda: whole_layers([value]),
    ]
    for call in calls:
        with pytest.raises(LayoutError):
            call()


def test_whole_numbers_of_any_type_are_the_same_sizes():
    layout = ParallelLayout(tp=np.int64(2), cp=np.uint8(2), dp=np.array(3))
    assert layout == ParallelLayout(tp=2, cp=2, dp=3) and type(layout.tp) is int and hash(layout)
    assert Packing.packed(np.array([0, 4, 8])) == Packing("thd", (4, 4)) == Packing("thd", [np.int32(4), 4])
    assert ParallelLayout(tp=2).coords(np.int64(1)) == ParallelLayout(tp=2).coords(1)


@pytest.mark.parametrize(("gpus", "refused"), [(1, True), (2, False), (0, False)])
def test_ranks_that_would_share_a_gpu_are_refused(gpus: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(LayoutError, match=r"2 ranks > 1 GPUs") if refused else nullcontext():
        check_gpus(ParallelLayout.smallest(ep=2))
