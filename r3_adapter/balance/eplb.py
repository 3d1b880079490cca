"""What others do with the same loads, to compare with: EPLB's redundant experts, and a placement for each micro-step.

EPLB is written from the description that deepseek-ai gives of it (github.com/deepseek-ai/EPLB, its global policy), not
from its code: the expert whose copies are fullest gets the next copy; copies go, the fullest first, to the emptiest
rank with a slot left. A token of an expert with several copies goes to each of them as often as to the others.

B: micro-steps; L: MoE layers; E: experts of a layer; R: ranks; N: slots of all ranks, N - E of them for copies.
"""

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.loads import Counts
from r3_adapter.errors import LayoutError, check_whole

Slots = npt.NDArray[np.int32]
"""[L, N]: the expert in each slot; the slots of a rank lie next to each other, an expert may be in several."""
Loads = npt.NDArray[np.float64]


def eplb(loads: Counts, num_ranks: int, num_slots: int) -> Slots:
    """Return [L, N] the expert in each slot, by the sums of [B, L, E] loads of the past.

    Raises:
        LayoutError: slots that ranks cannot share out evenly, or fewer of them than experts.
    """
    num_ranks = check_whole("num_ranks", num_ranks, error=LayoutError)
    num_slots = check_whole("num_slots", num_slots, error=LayoutError)
    num_experts = loads.shape[2]
    if num_ranks < 1 or num_slots % num_ranks or num_slots < num_experts:
        raise LayoutError(f"num_slots ({num_slots}) is no multiple of {num_ranks} ranks from {num_experts} experts on")
    sums = loads.sum(axis=0, dtype=np.int64).astype(np.float64)
    copies = np.ones(sums.shape, np.int64)
    layers = np.arange(len(sums))
    for _ in range(num_slots - num_experts):
        copies[layers, (sums / copies).argmax(axis=1)] += 1
    slots = np.empty((len(sums), num_slots), np.int32)
    for layer, (each, number) in enumerate(zip(sums / copies, copies, strict=True)):
        expert = np.repeat(np.arange(num_experts, dtype=np.int32), number)
        slots[layer] = expert[_packed(each[expert][None], num_ranks)[1][0].argsort(kind="stable")]
    return slots


def copied_loads(counts: Counts, slots: Slots, num_ranks: int) -> Loads:
    """Return [B, L, R] the tokens that each rank gets of [B, L, E], those of an expert shared out over its copies."""
    copies = np.stack([np.bincount(layer, minlength=counts.shape[2]) for layer in slots])
    each = counts / copies
    by_slot = np.take_along_axis(each, np.broadcast_to(slots[None], (len(counts), *slots.shape)), axis=2)
    found: Loads = by_slot.reshape(*counts.shape[:2], num_ranks, -1).sum(axis=3)
    return found


def placed_each(counts: Counts, num_ranks: int) -> Loads:
    """Return [B, L, R] the loads if every micro-step had a placement of its own, and to move experts cost nothing.

    The fullest expert first, each to the emptiest rank with a slot left: an oracle, but not the least there can be.
    """
    steps, layers, experts = counts.shape
    return _packed(counts.reshape(-1, experts).astype(np.float64), num_ranks)[0].reshape(steps, layers, num_ranks)


def _packed(weights: Loads, num_ranks: int) -> tuple[Loads, npt.NDArray[np.int64]]:
    """Return the loads [P, R] of the ranks and the rank [P, N] of each item, for each of [P, N] weights by itself."""
    problems = np.arange(len(weights))
    loads = np.zeros((len(weights), num_ranks))
    room = np.full((len(weights), num_ranks), weights.shape[1] // num_ranks)
    rank_of = np.empty(weights.shape, np.int64)
    for item in (-weights).argsort(axis=1, kind="stable").T:
        rank = np.where(room > 0, loads, np.inf).argmin(axis=1)
        loads[problems, rank] += weights[problems, item]
        room[problems, rank] -= 1
        rank_of[problems, item] = rank
    return loads, rank_of
