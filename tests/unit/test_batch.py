"""Sharing samples out over ranks, and putting their metrics together."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3_adapter.errors import LayoutError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.trainer import StepMetrics
from r3_adapter.metrics import gap, merge_gaps
from r3_adapter.ray.batch import items_of, metrics_of, share_out
from r3_adapter.ray.rollout import Rollout
from r3_adapter.ray.store import SampleRef

LAYOUTS = [ParallelLayout(), ParallelLayout(dp=3), ParallelLayout(pp=2, vpp=2, dp=2), ParallelLayout(tp=2, cp=2, dp=2)]


def ref(group: int, index: int, length: int, part: int = 0) -> SampleRef:
    return SampleRef(
        group=group,
        index=index,
        part=part,
        num_tokens=length + 3,
        num_prompt_tokens=3,
        num_sampled=length,
        objects=(),
        start=0,
        digests=(),
        num_bytes=10 * length,
    )


def rollouts(lengths: list[int], size: int = 4) -> list[Rollout]:
    found = []
    for number in range(len(lengths) // size):
        mine = lengths[number * size : (number + 1) * size]
        rewards = [float(i % 2) for i in range(size)]
        samples = [ref(number, i, length) for i, length in enumerate(mine)]
        found.append(Rollout(number, samples, rewards))
    return found


@given(
    st.lists(st.integers(1, 500), min_size=48, max_size=120).map(lambda xs: xs[: len(xs) // 4 * 4]),
    st.sampled_from(LAYOUTS),
    st.integers(2, 8),
    st.integers(1, 3),
)
def test_every_sample_is_in_one_micro_batch_and_ranks_have_as_many(
    lengths: list[int], layout: ParallelLayout, micro_batch_size: int, num_steps: int
) -> None:
    items = items_of(rollouts(lengths), "grpo")
    plan = share_out(items, layout, micro_batch_size=micro_batch_size, num_steps=num_steps)
    counts = Counter((item.ref.group, item.ref.index) for rank in plan for batch in rank for item in batch)
    assert set(counts.values()) == {1} and len(counts) == len(items)
    (per_rank,) = {len(rank) for rank in plan}
    assert len(plan) == layout.dp and per_rank % num_steps == 0
    assert layout.vpp == 1 or per_rank % layout.pp == 0
    loads = [sum(item.ref.num_tokens for item in batch) for rank in plan for batch in rank]
    assert all(loads) and max(loads) - min(loads) <= max(lengths) + 3


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(
        LayoutError, match=r"^4 samples of a step < 6 micro-batches \(dp 2 x 3, a multiple of 3 optimizer steps\)$"
    ):
        share_out(items_of(rollouts([5] * 4), "grpo"), ParallelLayout(dp=2), micro_batch_size=8, num_steps=3)


def test_weights_of_gspo_make_every_sequence_count_alike() -> None:
    items = items_of(rollouts([1, 2, 30, 4, 5, 6, 7, 80]), "gspo")
    shares = [item.weight * item.ref.num_sampled for item in items]
    assert shares == pytest.approx([shares[0]] * 8)
    assert sum(shares) == pytest.approx(sum(item.ref.num_sampled for item in items))


def test_parts_of_a_conversation_share_its_advantage() -> None:
    parts = [ref(0, 0, 4), ref(0, 0, 5, part=1), ref(0, 1, 6)]
    items = items_of([Rollout(0, parts, [1.0, 0.0])], "grpo")
    assert [item.advantage for item in items] == pytest.approx([1.0, 1.0, -1.0])


def test_figures_of_ranks_add_up() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=100), rng.normal(size=100)
    parts = [gap(ours[cut], theirs[cut]) for cut in (slice(0, 10), slice(10, 100))]
    whole, merged = gap(ours, theirs), merge_gaps(parts)
    for name in ("tokens", "mean_abs", "max_abs", "k3", "f_1_2", "f_2"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name))
    made = [
        StepMetrics(
            gap=parts[0], loss=1.0, num_trained=10, nll=5.0, grad_norms=[2.0], rows={"replayed": 3, "stale": 0}
        ),
        StepMetrics(
            gap=parts[1], loss=2.0, num_trained=90, nll=7.0, grad_norms=[2.0], rows={"replayed": 4, "stale": 0}
        ),
        StepMetrics(
            grad_norms=[2.0], agreement={1: (10, 9)}, seconds={"train": 2.0}, micro_batches={"all": 2, "planned": 0}
        ),
        StepMetrics(
            grad_norms=[2.0], agreement={1: (10, 8)}, seconds={"train": 3.0}, micro_batches={"all": 2, "planned": 2}
        ),
    ]
    found = metrics_of(rollouts([5] * 8), items_of(rollouts([5] * 8), "grpo"), made)
    assert found["rows"] == {"replayed": 7, "stale": 0} and found["micro_batches"] == {"all": 4, "planned": 2}
    assert found["agreement"] == {"1": 0.85} and found["seconds"]["train"] == 3.0
    assert found["loss"] == pytest.approx(0.03) and found["entropy"] == pytest.approx(0.12)
    assert found["reward"] == 0.5 and found["bytes"]["routes"] == 400
