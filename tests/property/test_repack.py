"""The native repack and collect against the slow ones, in every layout of up to 16 ranks, and against damage."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter import reference
from r3_adapter.errors import LayoutError, R3Error, TraceError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import LIVE, PADDING, collect, repack
from r3_adapter.trace import RoutingTrace, ids_dtype

DTYPES = (np.uint8, np.uint16, np.int16, np.int32, np.int64)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def all_layouts(most=16):
    for tp, pp, cp, dp in itertools.product(SIZES, repeat=4):
        if tp * pp * cp * dp <= most:
            for ep, etp in itertools.product(SIZES, repeat=2):
                if (tp * cp * dp) % (etp * ep) == 0:
                    yield ParallelLayout(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, dp=dp)


LAYOUTS = list(all_layouts())
NAMES = ("tp", "pp", "cp", "ep")
# What a rank's routes depend on; the rest of a layout only says which ranks have the same.
CUTS = {tuple(getattr(layout, name) for name in NAMES): layout for layout in LAYOUTS}


class Case(NamedTuple):
    traces: list
    packing: Packing
    layout: ParallelLayout
    stages: list
    dtype: type
    last_row: str = "live"
    slot_of: np.ndarray | None = None

    def slots_of(self, layers):
        """Return the rows of slot_of, [M, E], that a stage's layers have; nothing where experts lie in their order."""
        known = self.traces[0].layer_ids.tolist()
        return {} if self.slot_of is None else {"slot_of": self.slot_of[[known.index(layer) for layer in layers]]}

    def repack_all(self, function=repack, dp_rank=0, **options):
        """Return the routes of all ranks of one copy of the micro-batch."""
        coords = [self.layout.coords(rank) for rank in range(self.layout.world_size)]
        return [
            function(
                self.traces,
                self.packing,
                self.layout,
                rank,
                layer_ids=self.stages[place.pp_rank],
                dtype=self.dtype,
                input_ids=input_ids(self, place.cp_rank),
                last_row=self.last_row,
                **self.slots_of(self.stages[place.pp_rank]),
                **options,
            )
            for rank, place in enumerate(coords)
            if place.dp_rank == dp_rank
        ]

    def collect(self, shards, function=collect, **options):
        first = self.traces[0]
        return function(
            shards,
            [trace.token_ids for trace in self.traces],
            layer_ids=first.layer_ids.tolist(),
            num_experts=first.num_experts,
            **options,
        )


def input_ids(case, cp_rank):
    """Return the micro-batch's tokens as a context parallel rank's embedding gets them; padding is -7."""
    rows = reference.tokens_of_cp_rank(case.packing, case.layout.cp, cp_rank)
    padded = [np.full(length, -7, dtype=np.int64) for length in case.packing.padded_lengths]
    for each, trace in zip(padded, case.traces, strict=True):
        each[: trace.num_tokens] = trace.token_ids
    tokens = np.array([[padded[sample][pos] for sample, pos in row] for row in rows], dtype=np.int64)
    return tokens.T if case.packing.qkv_format == "sbhd" else tokens.reshape(-1)


def make_trace(rng, num_tokens, layer_ids, topk, num_experts, names):
    """Return a trace whose table of versions names what its rows use, in the order of first use."""
    ids = rng.random((num_tokens, len(layer_ids), num_experts)).argsort(axis=2)[:, :, :topk]
    version_ids = np.sort(rng.integers(0, len(names), num_tokens)).astype(np.int32)
    used, version_ids = np.unique(version_ids, return_inverse=True)
    version_ids = version_ids.astype(np.int32)
    version_ids[rng.random(num_tokens) < rng.choice([0, 0.3, 1])] = -1
    kept, moved = np.unique(version_ids[version_ids >= 0], return_inverse=True)
    version_ids[version_ids >= 0] = moved
    ids[version_ids < 0] = 0
    return RoutingTrace(
        ids.astype(ids_dtype(num_experts)),
        rng.integers(0, 1 << 20, num_tokens).astype(np.int32),
        version_ids,
        np.array(layer_ids, dtype=np.int32),
        num_experts,
        tuple(names[used[i]] for i in kept),
    )


def fits(dtype, num_experts):
    return num_experts <= np.iinfo(dtype).max + (np.dtype(dtype).kind == "i")


def make_packing(draw, layout, num_samples):
    """Return a packing that the layout can cut; a contiguous cut of a stream asks nothing of the samples in it."""
    cp_cut = draw(st.sampled_from(["zigzag", "contiguous"]))
    whole = layout.tp * (2 if cp_cut == "zigzag" and layout.cp > 1 else 1) * layout.cp
    if draw(st.booleans()):
        return Packing.padded(num_samples, whole * draw(st.integers(1, 2)), cp_cut=cp_cut)
    unit = 1 if cp_cut == "contiguous" or layout.cp == 1 else 2 * layout.cp
    lengths = [unit * draw(st.integers(0, 4)) for _ in range(num_samples - 1)]
    lengths.append(-sum(lengths) % whole + whole * draw(st.integers(0, 1)))
    return Packing.packed(np.cumsum([0, *lengths]), cp_cut=cp_cut)


def make_case(draw, layout, topk=None, num_experts=None, dtype=None):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if num_experts is None:
        num_experts = layout.ep * draw(
            st.integers(1 if layout.ep > 1 else 2, (1024, 16)[draw(st.booleans())] // layout.ep)
        )
    topk = topk or draw(st.integers(1, min(16, num_experts)))
    dtype = dtype or draw(st.sampled_from([d for d in DTYPES if fits(d, num_experts)]))
    num_layers = draw(st.integers(1, 4))
    layer_ids = np.sort(rng.choice(9, num_layers, replace=False)).tolist()
    # Interleaved stages, some of them without MoE layers.
    stages = [layer_ids[stage :: layout.pp] for stage in range(layout.pp)]
    packing = make_packing(draw, layout, num_samples=draw(st.integers(1, 3)))
    traces = [
        make_trace(rng, draw(st.integers(0, padded_length)), layer_ids, topk, num_experts, ["a", "b", "c"][sample:])
        for sample, padded_length in enumerate(packing.padded_lengths)
    ]
    return Case(traces, packing, layout, stages, dtype)


def assert_same_routes(found, wanted):
    for name in ("topk_ids", "row_versions", "layer_ids"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b), name
    assert found.weight_versions == wanted.weight_versions
    assert np.array_equal(found.counts, reference.count_experts(wanted))
    rows = {
        row + i * stride: (sample, pos + i)
        for sample, pos, length, row, stride in found.segments.tolist()
        for i in range(length)
    }
    assert rows == {row: (sample, pos) for sample, pos, _, row, _ in wanted.segments.tolist()}


def check(case):
    native, slow = case.repack_all(count=bool(len(case.traces) % 2)), case.repack_all(reference.repack)
    for found, wanted in zip(native, slow, strict=True):
        assert_same_routes(found, wanted)
        assert found.num_replayed + found.num_live + found.num_padding == found.topk_ids.shape[1]
    check_last_rows(case._replace(last_row="balanced"))
    assert case.collect(native) == case.traces
    assert case.collect(slow) == case.traces
    assert case.collect(native, reference.collect) == case.traces
    if case.slot_of is None:
        check(case._replace(slot_of=permutations(case)))


def permutations(case):
    """Return a slot of each expert of each layer, by chance."""
    first = case.traces[0]
    shape = (len(first.layer_ids), first.num_experts)
    return np.random.default_rng(case.packing.num_tokens).random(shape).argsort(axis=1).astype(np.int32)


def check_last_rows(case):
    """Without their live rows, last tokens count as padding, and every token is still on one rank of a stage."""
    native, slow = case.repack_all(count=True), case.repack_all(reference.repack)
    for found, wanted in zip(native, slow, strict=True):
        assert_same_routes(found, wanted)
    tokens = [place for shard in native for place in expand(shard.segments)[:, :2].tolist()]
    every = [[sample, pos] for sample, length in enumerate(case.packing.padded_lengths) for pos in range(length)]
    assert sorted(tokens) == sorted(every * case.layout.pp)
    last = sum(trace.num_tokens > 0 and not trace.captured[-1] for trace in case.traces)
    fed = sum(trace.num_tokens for trace in case.traces)
    counted = [sum(shard.num_padding for shard in native), sum(shard.num_live for shard in native)]
    captured = sum(int(trace.captured.sum()) for trace in case.traces)
    stages = case.layout.pp
    assert counted == [stages * (case.packing.num_tokens - fed + last), stages * (fed - captured - last)]


def test_layouts_are_all_there():
    assert len(LAYOUTS) > 900 and max(layout.world_size for layout in LAYOUTS) == 16
    assert len(CUTS) > 100


@pytest.mark.parametrize("layout", CUTS.values(), ids=["-".join(map(str, cut)) for cut in CUTS])
@settings(max_examples=3)
@given(data=st.data())
def test_native_equals_reference_and_collect_takes_it_back(layout, data):
    check(make_case(data.draw, layout))


@settings(max_examples=120)
@given(data=st.data())
def test_any_layout(data):
    check(make_case(data.draw, data.draw(st.sampled_from(LAYOUTS))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [2, 8, 254, 256, 258, 1024])
@settings(max_examples=4)
@given(data=st.data())
def test_every_pair_of_dtypes(num_experts, dtype, data):
    if fits(dtype, num_experts):
        check(make_case(data.draw, ParallelLayout.smallest(tp=2, ep=2), num_experts=num_experts, dtype=dtype))
        return
    with pytest.raises(LayoutError, match=rf"num_experts \({num_experts}\) > 255, the most that uint8 can hold"):
        make_case(data.draw, ParallelLayout(ep=2, dp=2), num_experts=num_experts, dtype=dtype).repack_all()


@pytest.mark.parametrize("topk", range(1, 17))
@settings(max_examples=4)
@given(data=st.data())
def test_every_topk(topk, data):
    check(make_case(data.draw, ParallelLayout(cp=2), topk=topk, num_experts=16))


@settings(max_examples=30)
@given(data=st.data(), num_threads=st.integers(2, 9))
def test_threads_change_nothing(data, num_threads):
    case = make_case(data.draw, data.draw(st.sampled_from(LAYOUTS)))
    shards = case.repack_all(num_threads=num_threads)
    for found, wanted in zip(shards, case.repack_all(), strict=True):
        assert_same_routes(found, replace(wanted, segments=expand(wanted.segments)))
    assert case.collect(shards, num_threads=num_threads) == case.traces


def expand(segments):
    lines = [
        (sample, pos + i, 1, row + i * stride, 1)
        for sample, pos, length, row, stride in segments.tolist()
        for i in range(length)
    ]
    return np.array(lines, dtype=np.int64).reshape(-1, 5)


@settings(max_examples=60)
@given(data=st.data())
def test_padding_loads_experts_and_their_ranks_evenly(data):
    layout = ParallelLayout(ep=data.draw(st.sampled_from([1, 2, 4])), dp=4)
    case = make_case(data.draw, layout)
    empty = [
        replace(t, **{n: getattr(t, n)[:0] for n in ("topk_ids", "token_ids", "version_ids")}) for t in case.traces
    ]
    for routes in case._replace(traces=empty).repack_all():
        assert routes.num_padding == routes.topk_ids.shape[1]
        for layer, counts in zip(routes.topk_ids, routes.counts, strict=True):
            assert all(len(set(row)) == len(row) for row in layer.tolist())
            assert counts.max() - counts.min() <= 1
            of_ranks = counts.reshape(layout.ep, -1).sum(axis=1)
            assert of_ranks.max() - of_ranks.min() <= 1


@pytest.mark.parametrize("align", [16, 32, 128])
@settings(max_examples=4)
@given(data=st.data())
def test_packed_samples_padded_for_fp8(align, data):
    """Each sample, or only the stream with a tail of its own, is padded to what FP8 kernels want of a rank."""
    layout = data.draw(st.sampled_from([x for x in LAYOUTS if x.world_size <= 8 and x.tp * x.cp > 1]))
    case = make_case(data.draw, layout, num_experts=layout.ep * 2, topk=1)
    whole, cp_cut = align * layout.tp * layout.cp * 2, data.draw(st.sampled_from(["zigzag", "contiguous"]))
    lengths = [trace.num_tokens for trace in case.traces]
    each = whole if data.draw(st.booleans()) else (2 * layout.cp if cp_cut == "zigzag" else 1)
    padded_lengths = [-(-length // each) * each for length in lengths]
    tail, traces = -sum(padded_lengths) % whole, [*case.traces, replace(case.traces[0].rows(0, 0), weight_versions=())]
    packing = Packing.packed(np.cumsum([0, *padded_lengths, tail]), cp_cut=cp_cut)
    padded = case._replace(traces=traces, packing=packing)
    check(padded)
    assert all(shard.topk_ids.shape[1] % align == 0 for shard in padded.repack_all())


def case_with_routes(draw):
    """Return a case with a token and all layers captured, and its shards."""
    case = make_case(draw, draw(st.sampled_from([x for x in LAYOUTS if x.world_size > 1])))
    if not any(trace.num_tokens for trace in case.traces):
        packing = (
            case.packing if all(case.packing.padded_lengths) else Packing.padded(1, 2 * case.layout.cp * case.layout.tp)
        )
        rng, first = np.random.default_rng(0), case.traces[0]
        args = (first.layer_ids.tolist(), first.topk, first.num_experts, ["a"])
        traces = [make_trace(rng, length, *args) for length in packing.padded_lengths]
        case = case._replace(packing=packing, traces=traces)
    return case


@settings(max_examples=60)
@given(data=st.data())
def test_a_wrong_token_is_refused_by_the_rank_that_has_it(data):
    case = case_with_routes(data.draw)
    sample = data.draw(st.sampled_from([i for i, trace in enumerate(case.traces) if trace.num_tokens]))
    pos = data.draw(st.integers(0, case.traces[sample].num_tokens - 1))
    tokens = case.traces[sample].token_ids.copy()
    tokens[pos] += 1
    wrong = [replace(t, token_ids=tokens) if i == sample else t for i, t in enumerate(case.traces)]
    refused = 0
    for rank in range(case.layout.world_size):
        place = case.layout.coords(rank)
        options = {"layer_ids": case.stages[place.pp_rank], "input_ids": input_ids(case, place.cp_rank)}
        owner = (sample, pos) in reference.tokens_of_rank(case.packing, case.layout, rank)
        for function in (repack, reference.repack):
            if owner:
                message = rf"sample {sample}\D.* position {pos}\D" if function is repack else None
                with pytest.raises(TraceError, match=message):
                    function(wrong, case.packing, case.layout, rank, **options)
            else:
                function(wrong, case.packing, case.layout, rank, **options)
        refused += owner
    assert refused == case.layout.world_size // (case.layout.cp * case.layout.tp)


@given(data=st.data())
@settings(max_examples=20)
def test_slots_are_those_of_the_routes_experts(data):
    case = case_with_routes(data.draw)
    placed = case._replace(slot_of=permutations(case))
    for plain, found in zip(case.repack_all(), placed.repack_all(), strict=True):
        routed = plain.row_versions >= 0
        for ids, slots, slot_of in zip(plain.topk_ids, found.topk_ids, found.slot_of, strict=True):
            assert np.array_equal(slot_of[ids[routed].astype(int)], slots[routed])
            assert np.array_equal(ids[~routed], slots[~routed])


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_shards_are_refused(data):
    case = case_with_routes(data.draw)
    if data.draw(st.booleans()):
        case = case._replace(slot_of=permutations(case))
    shards = case.repack_all()
    full = [i for i, shard in enumerate(shards) if len(shard.layer_ids) and (shard.row_versions != PADDING).any()]
    at = data.draw(st.sampled_from(full))
    for change in (drop_row, drop_layer, *(() if shards[at].num_replayed == 0 else (too_large, negative, twice))):
        damaged = [*shards]
        damaged[at] = change(shards[at])
        refuse_to_collect(case, damaged)
    refuse_to_collect(case, [*shards[:at], *shards[at + 1 :]])
    refuse_to_collect(case, [*shards, shards[at]])
    wrong = replace(
        shards[at], row_versions=np.where(shards[at].row_versions == PADDING, LIVE, PADDING).astype(np.int32)
    )
    refuse_to_collect(case, [*shards[:at], wrong, *shards[at + 1 :]])


def refuse_to_collect(case, shards):
    for function in (collect, reference.collect):
        with pytest.raises(R3Error):
            case.collect(shards, function)


def drop_row(shard):
    """Take a local row out that is not padding."""
    row = int(np.flatnonzero(shard.row_versions != PADDING)[-1])
    keep = np.delete(np.arange(len(shard.row_versions)), row)
    segments = expand(shard.segments)
    segments = segments[segments[:, 3] != row]
    segments[:, 3] -= segments[:, 3] > row
    ids = np.ascontiguousarray(shard.topk_ids[:, keep])
    return replace(shard, topk_ids=ids, row_versions=shard.row_versions[keep], segments=segments)


def drop_layer(shard):
    return replace(shard, topk_ids=shard.topk_ids[1:], layer_ids=shard.layer_ids[1:])


def set_id(shard, value):
    ids = shard.topk_ids.astype(np.int64)
    ids[-1, np.flatnonzero(shard.row_versions >= 0)[-1], -1] = value
    return replace(shard, topk_ids=ids)


def too_large(shard):
    return set_id(shard, shard.num_experts)


def negative(shard):
    return set_id(shard, -1)


def twice(shard):
    row = np.flatnonzero(shard.row_versions >= 0)[-1]
    if shard.topk_ids.shape[2] == 1:
        return negative(shard)
    return set_id(shard, int(shard.topk_ids[-1, row, 0]))
