"""Micro-batches whose tokens load the ranks that share experts out as evenly as can be, from routes that are known.

Samples change places within an optimizer step only. Its loss is a mean over the tokens of all of them, so its gradient
stays the same but for rounding.

L: MoE layers; E: experts of a layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.budgets import budgets_of_counts
from r3_adapter.balance.composition import Composed, compose_parts
from r3_adapter.balance.loads import Counts, Placed, identity
from r3_adapter.errors import LayoutError, check_choice
from r3_adapter.layout import ParallelLayout
from r3_adapter.ray.batch import Plan
from r3_adapter.ray.trainer import ItemRef
from r3_adapter.rl.checks import Balance, parts_of_group

_MORE_ROOM = 1.05
_TRIES = 8


def balanced(
    plan: Plan,
    layout: ParallelLayout,
    balance: Balance,
    *,
    num_steps: int,
    seed: Sequence[int],
    placed: Placed | None = None,
    max_received: int | None = None,
) -> Plan:
    """Return a plan of the same samples in each optimizer step, and of as many micro-batches, composed otherwise.

    plan: the micro-batches of each data-parallel rank, as share_out makes them.
    num_steps: optimizer steps, which have equal shares of a rank's micro-batches.
    placed: [L, E] the expert of each slot; None where experts lie in their order.
    max_received: tokens that a rank may receive in a layer of a micro-batch, without padding; None: as many as come.

    Raises:
        LayoutError: a sample whose loads were not counted; a rank that would receive too many tokens however samples
            are put together: names rank, layer and micro-batch.
    """
    check_choice("balance", balance, Balance)
    if balance == "off":
        return plan
    share = len(plan[0]) // num_steps
    found: Plan = [[] for _ in plan]
    for number in range(num_steps):
        part = [rank[number * share : (number + 1) * share] for rank in plan]
        composed = (
            _shuffled(part, np.random.default_rng([*seed, number]))
            if balance == "shuffle"
            else _packed(part, layout, placed, _seed(seed, number), max_received)
        )
        for rank, batches in enumerate(composed):
            found[rank] += batches
    return found


def _shuffled(part: Plan, rng: np.random.Generator) -> Plan:
    """Deal samples out in an order of chance, each to the micro-batch that has the fewest tokens."""
    items = [item for rank in part for batch in rank for item in batch]
    loads = np.zeros((len(part), len(part[0])))
    found: Plan = [[[] for _ in rank] for rank in part]
    for index in rng.permutation(len(items)).tolist():
        rank, batch = np.unravel_index(int(loads.argmin()), loads.shape)
        found[rank][batch].append(items[index])
        loads[rank, batch] += items[index].ref.num_tokens
    return found


def _seed(seed: Sequence[int], number: int) -> int:
    return int(np.random.SeedSequence([*seed, number]).generate_state(1)[0])


def _packed(part: Plan, layout: ParallelLayout, placed: Placed | None, seed: int, max_received: int | None) -> Plan:
    """Put samples together by their loads; no micro-batch gets much longer than the longest one was."""
    items = [item for rank in part for batch in rank for item in batch]
    tokens = np.array([item.ref.num_tokens for item in items], np.int64)
    counts = np.stack([_counts_of(item) for item in items])
    parts = parts_of_group(layout)
    groups = layout.dp // parts
    num_steps = len(part[0]) * groups
    longest = max(sum(item.ref.num_tokens for item in batch) for rank in part for batch in rank)
    placed = identity(*counts.shape[1:]) if placed is None else placed

    def compose(limit: int) -> Composed | None:
        sizes = {"num_parts": parts, "num_groups": groups, "num_steps": num_steps, "seed": seed}
        try:
            found = compose_parts(tokens, counts, placed, layout.ep, limit, **sizes)
        except LayoutError:
            if limit >= tokens.sum():
                raise
            return None
        return found if found.num_steps == num_steps else None

    # Where samples do not fit into as many micro-batches, there is more room for them.
    limit = longest
    while (composed := compose(limit)) is None:
        limit = int(limit * _MORE_ROOM) + 1
    if max_received is not None:
        tight = -(-int(tokens.sum()) // (num_steps * parts))
        limits = [int(tight * _MORE_ROOM**power) + 1 for power in range(_TRIES)]
        others = (each for each in map(compose, limits) if each is not None)
        composed = _within(max_received, composed, others, counts, placed, layout.ep)
    return [[[items[index] for index in batch] for batch in rank] for rank in composed.micro_batches()]


def _within(
    limit: int, first: Composed, others: Iterable[Composed], counts: Counts, placed: Placed, num_ranks: int
) -> Composed:
    """Return a way of putting samples together in which no rank receives too many tokens: the first one if it will do.

    Raises:
        LayoutError: there is none; names rank, layer and micro-batch of the most in the best way.
    """
    best, least = first, budgets_of_counts(first, counts, placed, num_ranks)
    for composed in others:
        if least.peak <= limit:
            break
        budgets = budgets_of_counts(composed, counts, placed, num_ranks)
        if budgets.peak < least.peak:
            best, least = composed, budgets
    least.check(limit)
    return best


def _counts_of(item: ItemRef) -> npt.NDArray[np.int32]:
    if item.ref.counts is None:
        raise LayoutError(f"{item.ref.name}: the loads of its routes were not counted")
    return item.ref.counts


@dataclass(frozen=True)
class ExpertLoad:
    """How even the ranks were in a step, by the tokens that their dispatchers gave to their experts.

    A token counts once for each of its experts.

    ratio: the sum over layers and micro-steps of the fullest rank's tokens over that of the mean rank's: 1 is even.
    worst: the largest quotient of a layer and micro-step.
    fullest, mean: tokens, summed over layers and micro-steps. busiest: of the rank that had most in the whole step.
    """

    ratio: float
    worst: float
    fullest: int
    mean: float
    busiest: int


def expert_load(found: Sequence[Mapping[int, Sequence[int]]], layout: ParallelLayout) -> ExpertLoad | None:
    """Return how even ranks were; None where no rank has experts.

    found: of each rank, by layer, the tokens that its experts got in each micro-batch.
    """
    fullest, mean, worst, busiest = 0, 0.0, 1.0, 0
    for start in range(0, layout.world_size, layout.expert_size):
        group = [found[rank] for rank in range(start, start + layout.expert_size) if layout.coords(rank).etp_rank == 0]
        for layer in group[0]:
            tokens = np.array([each[layer] for each in group])
            fullest += int(tokens.max(axis=0).sum())
            mean += float(tokens.mean(axis=0).sum())
            worst = max(worst, float((tokens.max(axis=0) / np.maximum(tokens.mean(axis=0), 1e-9)).max()))
        busiest = max(busiest, *(sum(map(sum, each.values())) for each in group))
    return ExpertLoad(fullest / mean, worst, fullest, mean, busiest) if mean else None
