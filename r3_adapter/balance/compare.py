"""What each measure makes of the loads of steps whose routes are known.

S: samples; B: micro-steps; L: MoE layers; E: experts of a layer; R: ranks that share them out.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.composition import Steps, compose, in_order
from r3_adapter.balance.drift import Moved, moved_between, placed_ago
from r3_adapter.balance.eplb import copied_loads, eplb, placed_each
from r3_adapter.balance.loads import Counts, Evenness, Placed, evenness_of, identity, over_mean, rank_loads, summed
from r3_adapter.balance.placement import place
from r3_adapter.balance.steps import Step

WAYS = {
    "arrival": "as it is: samples in the order of their arrival",
    "shuffled": "samples in an order of chance",
    "packed": "samples put together by their loads",
    "placed_last_shuffled": "experts placed by the step before, samples by chance",
    "placed_last": "packed, experts placed by the step before",
    "placed": "packed, experts placed by the very step",
    "eplb": "EPLB by the step before, samples by chance",
    "eplb_copies": "the same with a copy more on each rank",
    "oracle": "packed, a placement for each micro-step",
    "bound": "the hottest expert alone on its rank",
}
REAL = ("arrival", "shuffled", "packed", "placed_last_shuffled", "placed_last", "placed")
"""What a trainer can have without copies of experts and without moving them during a step."""


@dataclass(frozen=True)
class Way:
    """The fullest rank's loads [B, L] and the mean ones [B, L], over all steps."""

    fullest: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]

    @property
    def figures(self) -> Evenness:
        return evenness_of(self.fullest, self.mean)

    def by_layer(self) -> list[float]:
        """Return the ratio of each layer."""
        return _rounded(over_mean(self.fullest.sum(axis=0), self.mean.sum(axis=0)))

    def by_micro_step(self) -> list[float]:
        """Return the ratio of each micro-step, of one step after the other."""
        return _rounded(over_mean(self.fullest.sum(axis=1), self.mean.sum(axis=1)))


def _rounded(values: npt.NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in values]


@dataclass(frozen=True)
class Shown:
    """The last step, to look at: its micro-steps as they arrive, and packed by `placed`, as a trainer would have it.

    placed: by the step before, or by the very step if there is no other. newest: by the very step, for the next one.
    """

    tokens: npt.NDArray[np.int64]
    counts: Counts
    arrived: Steps
    packed: Steps
    placed: Placed
    newest: Placed


@dataclass(frozen=True)
class Balance:
    """What each way of WAYS gives, over all steps that have it.

    by_step: the ratio of each step, by way. moved, ago: see drift.py; ago is empty with fewer than three steps.
    seconds: of planning a step by the best way.
    """

    ways: dict[str, Way]
    by_step: list[dict[str, float]]
    moved: list[Moved]
    ago: list[tuple[int, Evenness]]
    shown: Shown
    num_ranks: int
    seconds: float

    @property
    def num_steps(self) -> int:
        return len(self.moved) + 1

    @property
    def num_micro_steps(self) -> int:
        return len(self.ways["placed"].mean)

    def to_json(self) -> dict[str, Any]:
        """Return the ways with their figures, and the rest."""
        real = {name: self.ways[name] for name in REAL if name in self.ways}
        return {
            **{name: _figures(way.figures) for name, way in self.ways.items()},
            "num_steps": self.num_steps,
            "num_micro_steps": self.num_micro_steps,
            "seconds": round(self.seconds, 4),
            "layers": {name: way.by_layer() for name, way in real.items()},
            "micro_steps": {name: way.by_micro_step() for name, way in real.items()},
            "steps": self.by_step,
            "moved": [_figures(each) for each in self.moved],
            "placed_ago": [{"ago": ago, **_figures(each)} for ago, each in self.ago],
        }


def _figures(found: Evenness | Moved) -> dict[str, Any]:
    return {key: round(value, 4) for key, value in asdict(found).items()}


class _Plan(NamedTuple):
    """What is planned from the routes of one step alone."""

    shuffled: Steps
    placed: Placed
    packed: Steps
    seconds: float


def compare(steps: Sequence[Step], num_ranks: int, max_tokens: int, *, num_groups: int = 1, seed: int = 0) -> Balance:
    """Say what each way gives. The first of several steps only serves to place the experts of the second."""

    def pack(step: Step, placed: Placed) -> Steps:
        return compose(*step, placed, num_ranks, max_tokens, seed=seed)

    def plan(number: int, step: Step) -> _Plan:
        shuffled = in_order(np.random.default_rng([seed, number]).permutation(len(step[0])), step[0], max_tokens)
        start = time.perf_counter()
        placed = place(summed(shuffled, step[1]), num_ranks, num_groups=num_groups, seed=seed)
        return _Plan(shuffled, placed, pack(step, placed), time.perf_counter() - start)

    plans = [plan(number, step) for number, step in enumerate(steps)]
    arrived = [in_order(range(len(tokens)), tokens, max_tokens) for tokens, _ in steps]
    found = []
    for number in range(min(1, len(steps) - 1), len(steps)):
        step, own = steps[number], plans[number]
        as_is = identity(*step[1].shape[1:])
        by = {
            "arrival": (arrived[number], as_is),
            "shuffled": (own.shuffled, as_is),
            "packed": (pack(step, as_is), as_is),
        }
        by["placed"] = own.packed, own.placed
        if number:
            before = plans[number - 1].placed
            by |= {"placed_last": (pack(step, before), before), "placed_last_shuffled": (own.shuffled, before)}
        ways = {name: _way(rank_loads(summed(each, step[1]), where, num_ranks)) for name, (each, where) in by.items()}
        ways |= _others(step[1], own, steps[number - 1][1] if number else None, num_ranks)
        found.append(ways)
    last = plans[-2 if len(steps) > 1 else -1].placed
    return Balance(
        ways={name: _joined([each[name] for each in found]) for name in WAYS if name in found[0]},
        by_step=[{name: round(way.figures.ratio, 4) for name, way in each.items()} for each in found],
        moved=moved_between(steps),
        ago=placed_ago(steps, [each.placed for each in plans], num_ranks, max_tokens, seed=seed)
        if len(steps) > 2
        else [],
        shown=Shown(*steps[-1], arrived[-1], pack(steps[-1], last), last, plans[-1].placed),
        num_ranks=num_ranks,
        seconds=float(np.median([each.seconds for each in plans])),
    )


def _others(counts: Counts, own: _Plan, before: Counts | None, num_ranks: int) -> dict[str, Way]:
    """Return what others do, and what bounds all. before: counts of the step before."""
    packed = summed(own.packed, counts)
    mean = packed.sum(axis=2) / num_ranks
    ways = {"oracle": _way(placed_each(packed, num_ranks)), "bound": Way(np.maximum(packed.max(axis=2), mean), mean)}
    if before is not None:
        shuffled, experts = summed(own.shuffled, counts), counts.shape[2]
        for name, slots in (("eplb", experts), ("eplb_copies", experts + num_ranks)):
            placed = eplb(before, num_ranks, slots)
            ways[name] = _way(copied_loads(shuffled, placed, num_ranks))
    return ways


def _way(loads: npt.NDArray[np.integer] | npt.NDArray[np.floating]) -> Way:
    return Way(loads.max(axis=2).astype(np.float64), loads.mean(axis=2))


def _joined(ways: Sequence[Way]) -> Way:
    return Way(np.concatenate([way.fullest for way in ways]), np.concatenate([way.mean for way in ways]))
