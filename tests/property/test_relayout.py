"""relayout is repack of collect, and refuses what they refuse."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter.errors import LayoutError, R3Error, TraceError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.relayout import relayout
from r3_adapter.repack import LIVE, PADDING, repack

SPEC = importlib.util.spec_from_file_location("cases_of_repack", Path(__file__).with_name("test_repack.py"))
cases = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cases)


def names(routes):
    return [version if version < 0 else routes.weight_versions[version] for version in routes.row_versions.tolist()]


def packing_for(draw, layout, lengths):
    """Return any packing in which samples of these lengths have room."""
    cp_cut = draw(st.sampled_from(["zigzag", "contiguous"]))
    parts = layout.cp * (2 if cp_cut == "zigzag" and layout.cp > 1 else 1)
    whole = parts * layout.tp
    if draw(st.booleans()):
        return Packing.padded(len(lengths), -(-max(*lengths, 1) // whole) * whole, cp_cut=cp_cut)
    unit = 1 if cp_cut == "contiguous" else parts
    rooms = [-(-length // unit) * unit + unit * draw(st.integers(0, 1)) for length in lengths]
    rooms[-1] += -sum(rooms) % whole
    return Packing.packed(np.cumsum([0, *rooms]), cp_cut=cp_cut)


@settings(max_examples=150)
@given(data=st.data())
def test_relayout_is_repack_of_collect(data):
    case = cases.make_case(data.draw, data.draw(st.sampled_from(cases.LAYOUTS)))
    shards = case.repack_all()
    choices = [x for x in cases.LAYOUTS if case.traces[0].num_experts % x.ep == 0]
    layout = data.draw(st.sampled_from(choices))
    chosen = data.draw(st.lists(st.sampled_from(range(len(case.traces))), min_size=1, max_size=4, unique=True))
    traces = [case.traces[sample] for sample in chosen]
    packing = packing_for(data.draw, layout, [trace.num_tokens for trace in traces])
    rank = data.draw(st.integers(0, layout.world_size - 1))
    layers = data.draw(st.permutations(case.traces[0].layer_ids.tolist()))
    new = case._replace(traces=traces, packing=packing, layout=layout)
    options = {
        "layer_ids": layers[: data.draw(st.integers(0, len(layers)))],
        "dtype": data.draw(st.sampled_from([d for d in cases.DTYPES if cases.fits(d, traces[0].num_experts)])),
        "input_ids": cases.input_ids(new, layout.coords(rank).cp_rank),
    }
    tokens = [trace.token_ids for trace in case.traces]
    whole = case.collect(shards)
    wanted = repack([whole[sample] for sample in chosen], packing, layout, rank, **options)
    found = relayout(shards, tokens, packing, layout, rank, samples=chosen, **options)
    assert found.topk_ids.dtype == wanted.topk_ids.dtype
    assert np.array_equal(found.topk_ids, wanted.topk_ids)
    assert names(found) == names(wanted)
    assert np.array_equal(found.counts, wanted.counts)
    assert np.array_equal(found.segments, wanted.segments)


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_shards_are_refused(data):
    case = cases.case_with_routes(data.draw)
    shards, tokens = case.repack_all(), [trace.token_ids for trace in case.traces]
    layout = ParallelLayout()
    packing = Packing.packed(np.cumsum([0, *map(len, tokens)]))
    options = {"layer_ids": case.traces[0].layer_ids.tolist(), "dtype": np.int32}
    relayout(shards, tokens, packing, layout, 0, **options)
    full = [i for i, shard in enumerate(shards) if len(shard.layer_ids) and (shard.row_versions != PADDING).any()]
    at = data.draw(st.sampled_from(full))
    changes = [cases.drop_row, cases.drop_layer, flip_padding]
    changes += [cases.too_large, cases.negative, cases.twice] if shards[at].num_replayed else []
    for change in changes:
        with pytest.raises(R3Error):
            relayout([*shards[:at], change(shards[at]), *shards[at + 1 :]], tokens, packing, layout, 0, **options)
    for damaged in ([*shards[:at], *shards[at + 1 :]], [*shards, shards[at]]):
        with pytest.raises(R3Error):
            relayout(damaged, tokens, packing, layout, 0, **options)


def flip_padding(shard):
    return replace(shard, row_versions=np.where(shard.row_versions == PADDING, LIVE, PADDING).astype(np.int32))


def test_relayout_refuses():
    rng = np.random.default_rng(0)
    traces = [cases.make_trace(rng, 4, [0, 2], 2, 6, ["a"])] * 2
    packing, layout = Packing.packed([0, 4, 8]), ParallelLayout()
    shards = [repack(traces, packing, layout, 0, layer_ids=[0, 2])]
    tokens = [trace.token_ids for trace in traces]
    other = replace(shards[0], num_experts=7)
    expected = np.concatenate(tokens).astype(np.int64)
    calls = [
        (LayoutError, {"shards": []}, "no shards"),
        (
            TraceError,
            {"shards": [shards[0], other]},
            r"num_experts and topk \(7, 2\) of shard 1 != \(6, 2\) of shard 0",
        ),
        (LayoutError, {"token_ids": tokens[:1]}, "1 samples != 2 samples of the packing"),
        (LayoutError, {"samples": [0, 2]}, r"sample \(2\) is none of the 2 samples"),
        (LayoutError, {"packing": Packing.packed([0, 3, 8])}, r"4 tokens of sample 0 > room \(3\)"),
        (LayoutError, {"layout": ParallelLayout(ep=4, dp=4)}, r"ep \(4\) does not divide num_experts \(6\)"),
        (LayoutError, {"layer_ids": [0, 0]}, "name a layer twice"),
        (TraceError, {"layer_ids": [0, 1]}, "no shard holds sample 0, token 0, layer 1"),
        (TraceError, {"input_ids": expected + (np.arange(8) == 5)}, r"of sample 1 at position 1 != .* at local row 5"),
    ]
    arguments = {"shards": shards, "token_ids": tokens, "packing": packing, "layout": layout, "rank": 0}
    arguments |= {"layer_ids": [0, 2], "input_ids": expected}
    relayout(**arguments)
    for error, changes, message in calls:
        with pytest.raises(error, match=message):
            relayout(**{**arguments, **changes})
