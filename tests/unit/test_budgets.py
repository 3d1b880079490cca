"""Budgets: what each rank receives, counted from routes before anything is sent, and what Megatron is to be told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter.balance.budgets import Budgets, budgets_of_counts, budgets_of_routes, compose_within
from r3_adapter.balance.composition import compose_parts
from r3_adapter.balance.loads import count_traces, identity
from r3_adapter.balance.simulate import World, simulate
from r3_adapter.errors import LayoutError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import repack
from r3_adapter.trace import RoutingTrace

LAYERS = np.array([1, 4], np.int32)


def a_trace(rng, num_tokens, num_experts=8, topk=2):
    scores = rng.gumbel(size=(num_tokens, 2, num_experts)) + np.linspace(0, 2, num_experts)
    ids = np.ascontiguousarray(np.argsort(-scores, axis=2)[..., :topk].astype(np.uint8))
    tokens = np.arange(num_tokens, dtype=np.int32)
    return RoutingTrace(ids, tokens, np.zeros(num_tokens, np.int32), LAYERS, num_experts, ("0",))


@given(seed=st.integers(0, 2**32), sizes=st.sampled_from([(1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 4, 2)]))
@settings(max_examples=15, deadline=None)
def test_budgets_are_the_rows_that_each_ranks_experts_get(seed, sizes):
    tp, ep, etp = sizes
    layout = ParallelLayout.smallest(tp=tp, ep=ep, etp=etp)
    routes, received, rows = [], np.zeros((3, 2, ep), np.int64), []
    for batch in range(3):
        own = []
        for rank in range(layout.world_size):
            # Ranks of one data-parallel rank have the same samples, each a part of their rows.
            mine = np.random.default_rng([seed, batch, layout.coords(rank).dp_rank])
            traces = [a_trace(mine, int(mine.integers(3, 30))) for _ in range(2)]
            multiple = 2 * tp
            padded_lengths = [-(-trace.num_tokens // multiple) * multiple for trace in traces]
            packing = Packing.packed(np.cumsum([0, *padded_lengths]))
            own.append(repack(traces, packing, layout, rank, layer_ids=LAYERS))
        routes.append(own)
        rows.append([each.topk_ids.shape[1] * 2 for each in own])
        for each in own:
            for layer, ids in enumerate(each.topk_ids):
                np.add.at(received[batch, layer], ids.ravel() // (8 // ep), 1)
    found = budgets_of_routes(routes, ep)
    assert np.array_equal(found.received, received)
    assert found.sent.min() == np.min(rows)
    factor = found.capacity_factor()
    assert all(
        (np.floor(sent * factor) >= most.max(axis=0)).all() for sent, most in zip(found.sent, received, strict=True)
    )
    worst = (received.max(axis=1) / found.sent).max()
    assert factor == pytest.approx(worst)


def test_a_limit_names_rank_layer_and_micro_batch():
    received = np.array([[[3, 5], [4, 4]], [[1, 9], [2, 7]]], np.int64)
    budgets = Budgets(received, np.array([[4, 4], [5, 5]]), LAYERS, num_local_experts=2)
    budgets.check(9)
    says = r"rank 1 of the expert group receives 9 tokens > 6 in layer 1 of micro-batch 1; 1 more are over it"
    with pytest.raises(LayoutError, match=says):
        budgets.check(6)
    assert budgets.capacity_factor() == pytest.approx(9 / 5)
    assert budgets.capacity_factor(multiple=4) == pytest.approx(15 / 5)


def test_a_stash_holds_the_pages_of_all_micro_batches_in_flight():
    received = np.array([[[3, 5]], [[1, 9]], [[8, 2]]], np.int64)
    budgets = Budgets(received, np.array([[4, 4], [5, 5], [5, 5]]), LAYERS[:1])
    assert budgets.stash_factor(1, page_size=1) == pytest.approx(9 / 5)
    assert budgets.stash_factor(2, page_size=1) == pytest.approx(14 / 10)
    assert budgets.stash_factor(2, page_size=4) == pytest.approx((8 + 12) / 10)
    assert budgets.stash_factor(9, page_size=1) == pytest.approx(16 / 14)
    with pytest.raises(LayoutError, match=r"in_flight \(0\) < 1"):
        budgets.stash_factor(0)


def a_step(seed=0):
    world = World("medium", num_experts=16, topk=4, num_layers=2, num_prompts=8, samples_per_prompt=8, mean_tokens=300)
    return simulate(world, 1, seed)[0]


def test_a_step_over_its_limit_is_recomposed_or_refused():
    tokens, counts = a_step()
    placed = identity(2, 16)
    wide = budgets_of_counts(compose_parts(tokens, counts, placed, 4, 4000), counts, placed, 4)
    limit = int(wide.peak * 0.6)
    composed, budgets = compose_within(limit, tokens, counts, placed, 4, 4000)
    assert budgets.peak <= limit
    assert composed.num_steps > len(wide.received)
    assert np.array_equal(budgets.received.sum(axis=0).sum(axis=1), counts.sum(axis=(0, 2)))
    longest = int(tokens.max())
    says = r"rank \d of the expert group receives [\d,]+ tokens > 100 in layer 7 of micro-batch \d+; .*it has 1 samples"
    with pytest.raises(LayoutError, match=says):
        compose_within(100, tokens, counts, placed, 4, longest, layer_ids=np.array([7, 7], np.int32))


def test_rows_of_routers_that_select_are_refused():
    rng = np.random.default_rng(0)
    trace = a_trace(rng, 6)
    versions, ids = trace.version_ids.copy(), trace.topk_ids.copy()
    versions[2], ids[2] = -1, 0
    live = RoutingTrace(ids, trace.token_ids, versions, LAYERS, 8, ("0",))
    packing = Packing.packed([0, 6])
    layout = ParallelLayout()
    with pytest.raises(LayoutError, match="micro-batch 0, rank 0: 1 rows are routed live"):
        budgets_of_routes([[repack([live], packing, layout, 0, layer_ids=LAYERS)]], 1)
    found = budgets_of_routes([[repack([trace], packing, layout, 0, layer_ids=LAYERS)]], 1)
    assert np.array_equal(found.received[0, :, 0], count_traces([trace])[0].sum(axis=1))
    with pytest.raises(LayoutError, match="no routes"):
        budgets_of_routes([], 1)
