"""Micro-batches that are composed by loads: nothing is lost, optimizer steps keep their samples, ranks become even."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter.balance.loads import identity, rank_loads
from r3_adapter.errors import LayoutError, R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.ray.balanced import balanced, expert_load
from r3_adapter.ray.batch import items_of, share_out
from r3_adapter.ray.rollout import Rollout
from r3_adapter.ray.store import SampleRef
from r3_adapter.rl.checks import check_balance, check_max_received, parts_of_group

LAYOUTS = [
    ParallelLayout(dp=2, ep=2),
    ParallelLayout(dp=4, ep=2),
    ParallelLayout(tp=2, dp=2, ep=2, etp=1),
    ParallelLayout(dp=4, ep=4),
    ParallelLayout(pp=2, vpp=2, dp=2, ep=2),
]
EXPERTS, LAYERS = 8, 3


def items(rng, num_samples):
    """Return samples of prompts of four, whose tokens like some experts more than others."""
    samples = []
    for index in range(num_samples):
        length = int(rng.integers(4, 90))
        popular = rng.dirichlet(np.full(EXPERTS, 0.3), LAYERS)
        counts = np.stack([rng.multinomial(2 * length, each) for each in popular]).astype(np.int32)
        samples.append(SampleRef(index // 4, index % 4, 0, length, 1, length - 1, (), 0, (), 9, counts=counts))
    groups = [Rollout(at, samples[4 * at : 4 * at + 4], [0.0, 1.0, 0.0, 1.0]) for at in range(num_samples // 4)]
    return items_of(groups, "grpo")


def names(plan):
    return sorted(item.ref.name for rank in plan for batch in rank for item in batch)


def shares(plan, num_steps):
    """Return the plan of each optimizer step."""
    size = len(plan[0]) // num_steps
    return [[rank[at * size : (at + 1) * size] for rank in plan] for at in range(num_steps)]


def fullest(plan, layout):
    """Return the tokens of the fullest ranks of all micro-steps and layers, and of the mean ones."""
    parts, total, mean = parts_of_group(layout), 0, 0.0
    for group in range(layout.dp // parts):
        for number in range(len(plan[0])):
            ranks = plan[group * parts : (group + 1) * parts]
            counts = np.sum([item.ref.counts for rank in ranks for item in rank[number]], axis=0, dtype=np.int32)
            loads = rank_loads(counts[None], identity(LAYERS, EXPERTS), layout.ep)
            total, mean = total + int(loads.max(axis=2).sum()), mean + float(loads.mean(axis=2).sum())
    return total, mean


@given(
    seed=st.integers(0, 2**32),
    layout=st.sampled_from(LAYOUTS),
    num_steps=st.integers(1, 2),
    balance=st.sampled_from(["off", "shuffle", "pack"]),
)
@settings(max_examples=40, deadline=None)
def test_optimizer_steps_keep_their_samples_and_ranks_as_many_micro_batches(seed, layout, num_steps, balance):
    rng = np.random.default_rng(seed)
    plan = share_out(items(rng, 64), layout, micro_batch_size=4, num_steps=num_steps)
    found = balanced(plan, layout, balance, num_steps=num_steps, seed=[seed, 1])
    assert [len(rank) for rank in found] == [len(rank) for rank in plan]
    assert all(batch for rank in found for batch in rank)
    for before, after in zip(shares(plan, num_steps), shares(found, num_steps), strict=True):
        assert names(before) == names(after)
    again = balanced(plan, layout, balance, num_steps=num_steps, seed=[seed, 1])
    assert again == found
    if balance == "off":
        assert found == plan


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_packed_samples_load_ranks_more_evenly(layout):
    rng = np.random.default_rng(5)
    plan = share_out(items(rng, 96), layout, micro_batch_size=4, num_steps=1)
    packed = balanced(plan, layout, "pack", num_steps=1, seed=[0])
    before, mean = fullest(plan, layout)
    after, same = fullest(packed, layout)
    assert same == pytest.approx(mean)
    assert after - mean < 0.8 * (before - mean)


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_no_rank_receives_more_than_a_limit_or_the_step_is_refused_by_name(layout):
    plan = share_out(items(np.random.default_rng(5), 96), layout, micro_batch_size=4, num_steps=1)

    def peak(found):
        parts = parts_of_group(layout)
        groups = [found[at : at + parts] for at in range(0, layout.dp, parts)]
        return max(
            int(
                rank_loads(
                    np.sum([[item.ref.counts for rank in group for item in rank[number]]], axis=1), as_is, layout.ep
                ).max()
            )
            for group in groups
            for number in range(len(found[0]))
        )

    as_is = identity(LAYERS, EXPERTS)
    free = balanced(plan, layout, "pack", num_steps=1, seed=[0])
    assert balanced(plan, layout, "pack", num_steps=1, seed=[0], max_received=peak(free)) == free
    tight = int(peak(free) * 0.98)
    with suppress(LayoutError):
        assert peak(balanced(plan, layout, "pack", num_steps=1, seed=[0], max_received=tight)) <= tight
    says = (
        r"rank \d of (the expert group|expert group \d) receives [\d,]+ tokens > 50 in MoE layer \d of micro-batch \d"
    )
    with pytest.raises(LayoutError, match=says):
        balanced(plan, layout, "pack", num_steps=1, seed=[0], max_received=50)


@pytest.mark.parametrize(
    ("balance", "layout", "says"),
    [
        ("shuffle", LAYOUTS[0], "--r3-max-received 9 with --r3-balance shuffle"),
        ("pack", ParallelLayout(tp=4, dp=1, ep=2, etp=1), r"etp \* ep \(2\) ranks have a part of each micro-batch"),
    ],
)
def test_a_limit_that_cannot_be_counted_is_refused(balance, layout, says):
    with pytest.raises(R3Error, match=says):
        check_max_received(9, balance, layout)
    check_max_received(None, balance, layout)
    check_max_received(9, "pack", LAYOUTS[3])


def test_samples_whose_loads_nobody_counted_are_refused():
    layout = LAYOUTS[0]
    plan = share_out(items(np.random.default_rng(0), 8), layout, micro_batch_size=2, num_steps=1)
    plan[0][0][0] = replace(plan[0][0][0], ref=replace(plan[0][0][0].ref, counts=None))
    with pytest.raises(LayoutError, match=r"prompt \d, sample \d.0: the loads of its routes were not counted"):
        balanced(plan, layout, "pack", num_steps=1, seed=[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"balance": "even"}, "balance 'even' is none of 'off', 'shuffle', 'pack', 'place'"),
        ({"placed": True}, "--r3-balance pack: --r3-placement is for --r3-balance place"),
        ({"balance": "place"}, "--r3-balance place: --r3-placement is missing"),
        ({"replay": "r2"}, "--r3-balance pack without --r3"),
        ({"layout": ParallelLayout(dp=2)}, "with expert-model-parallel-size 1: one rank has all experts"),
        ({"layout": ParallelLayout(tp=2, dp=3, ep=3, etp=1)}, r"expert groups of etp \* ep \(3\) ranks lie across"),
    ],
)
def test_a_balance_that_cannot_hold_is_refused(change, says):
    given = {"balance": "pack", "layout": LAYOUTS[0], "replay": "r3", "placed": False, **change}
    with pytest.raises(R3Error, match=says):
        check_balance(given.pop("balance"), given.pop("layout"), **given)
    check_balance("shuffle", ParallelLayout(), replay="off", placed=False)


def test_loads_of_ranks_are_compared_within_their_expert_group():
    layout = ParallelLayout(dp=4, ep=2)
    found = expert_load([{1: [6, 2]}, {1: [2, 2]}, {1: [10, 0]}, {1: [10, 4]}], layout)
    assert (found.fullest, found.mean, found.busiest, found.worst) == (6 + 2 + 10 + 4, 18, 14, 2)
    assert found.ratio == pytest.approx(22 / 18)
    assert expert_load([{}, {}, {}, {}], layout) is None
