"""From rollouts to what the trainer's ranks are given, and from their metrics to a step's metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r3_adapter.errors import check_choice
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.trainer import StepMetrics
from r3_adapter.metrics import merge_gaps
from r3_adapter.ray.rollout import Rollout
from r3_adapter.ray.trainer import ItemRef
from r3_adapter.rl.checks import num_micro_batches
from r3_adapter.rl.losses import Estimator, group_advantages

Plan = list[list[list[ItemRef]]]
"""The micro-batches of each data-parallel rank."""


def items_of(rollouts: Sequence[Rollout], estimator: Estimator) -> list[ItemRef]:
    """Return all samples of the rollouts with their advantages and the weight of their tokens.

    GRPO takes the mean over all tokens of the batch; GSPO that over sequences, whose tokens then weigh the less the
    longer the sequence is, and one on average.

    Raises:
        R3Error: an estimator that is not known.
    """
    check_choice("estimator", estimator, Estimator)
    refs = [ref for rollout in rollouts for ref in rollout.samples]
    advantages = {
        (rollout.number, index): float(advantage)
        for rollout in rollouts
        for index, advantage in enumerate(group_advantages(np.array(rollout.rewards)))
    }
    tokens = sum(ref.num_sampled for ref in refs)
    return [
        ItemRef(
            ref,
            advantages[ref.group, ref.index],
            tokens / (len(refs) * max(1, ref.num_sampled)) if estimator == "gspo" else 1.0,
        )
        for ref in refs
    ]


def share_out(items: Sequence[ItemRef], layout: ParallelLayout, *, micro_batch_size: int, num_steps: int) -> Plan:
    """Share samples out over micro-batches of about equal numbers of tokens, as many for each data-parallel rank.

    micro_batch_size, num_steps: as in num_micro_batches.

    Raises:
        LayoutError: fewer samples than micro-batches.
    """
    per_rank = num_micro_batches(len(items), layout, micro_batch_size=micro_batch_size, num_steps=num_steps)
    bins: list[list[ItemRef]] = [[] for _ in range(layout.dp * per_rank)]
    loads = np.zeros(len(bins))
    for item in sorted(items, key=lambda item: -item.ref.num_tokens):
        # The emptiest bin gets the next longest sample; one without any comes first.
        chosen = int(np.argmin(loads))
        bins[chosen].append(item)
        loads[chosen] += item.ref.num_tokens
    return [bins[rank :: layout.dp] for rank in range(layout.dp)]


def metrics_of(
    rollouts: Sequence[Rollout], items: Sequence[ItemRef], rank_metrics: Sequence[StepMetrics]
) -> dict[str, Any]:
    """Return the metrics of a step: sums over ranks where they count, the slowest rank where they take time."""
    rewards = np.array([reward for rollout in rollouts for reward in rollout.rewards])
    gap = merge_gaps([each.gap for each in rank_metrics if each.gap is not None])
    trained = sum(each.num_trained for each in rank_metrics)
    scored = [each.kl_ref for each in rank_metrics if each.kl_ref is not None]
    agreement: dict[int, np.ndarray[Any, Any]] = {}
    for each in rank_metrics:
        for layer, counts in each.agreement.items():
            agreement[layer] = agreement.get(layer, np.zeros(2, np.int64)) + counts
    stages = {stage for each in rank_metrics for stage in each.seconds}
    seconds = {stage: max(each.seconds.get(stage, 0.0) for each in rank_metrics) for stage in sorted(stages)}
    for rollout in rollouts:
        for stage, spent in rollout.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "loss": sum(each.loss for each in rank_metrics) / trained,
        "clip_fraction": sum(each.num_clipped for each in rank_metrics) / trained,
        "grad_norm": float(np.mean(rank_metrics[0].grad_norms)),
        "lr": rank_metrics[0].lr,
        # Of tokens that the policy sampled, an unbiased estimate of its entropy at the rollout's temperature.
        "entropy": sum(each.nll for each in rank_metrics) / gap.tokens,
        **({"kl_ref": sum(scored) / gap.tokens} if scored else {}),
        "k3": gap.k3,
        "f_1_2": gap.f_1_2,
        "f_2": gap.f_2,
        "mean_abs": gap.mean_abs,
        "max_abs": gap.max_abs,
        "response_tokens": gap.tokens,
        "samples": len(items),
        "agreement": {str(layer): int(equal) / max(1, int(ids)) for layer, (ids, equal) in sorted(agreement.items())},
        "rows": _summed([each.rows for each in rank_metrics]),
        "micro_batches": _summed([each.micro_batches for each in rank_metrics]),
        "seconds": seconds,
        "bytes": {"routes": sum(item.ref.num_bytes for item in items)},
        "memory": {
            "trainer_rss": sum(each.resident_bytes for each in rank_metrics),
            "engine_rss": sum(rollout.resident_bytes for rollout in rollouts),
        },
    }


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    kinds = dict.fromkeys(kind for each in counts for kind in each)
    return {kind: sum(each.get(kind, 0) for each in counts) for kind in kinds}
