"""`r3 balance`: how even the ranks' loads of a run are, and what placement and composition would make of them."""

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from r3_adapter.balance.composition import compose, in_order
from r3_adapter.balance.loads import Counts, Evenness, Placed, count_traces, evenness, identity, rank_loads, summed
from r3_adapter.balance.placement import place
from r3_adapter.balance.simulate import World, simulate
from r3_adapter.errors import LayoutError, R3Error
from r3_adapter.rollout import SampleFolder, sample_folders

Step = tuple[npt.NDArray[np.int64], Counts]
"""The tokens [S] of the samples of a step, and their counts [S, L, E]."""
WAYS = {
    "arrival": "as it is: samples in the order of their arrival",
    "shuffled": "samples in an order of chance",
    "packed": "samples put together by their loads",
    "placed_last": "packed, experts placed by the step before",
    "placed": "packed, experts placed by the very step",
}
_STEP = re.compile(r"(\d{6})-\d{5}")


@dataclass(frozen=True)
class Balance:
    """What each way of WAYS gives, over all steps that have it; seconds: of planning a step by the best of them."""

    ways: dict[str, Evenness]
    num_steps: int
    num_micro_steps: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the ways with their figures, and the rest."""
        ways = {
            name: {key: round(value, 4) for key, value in asdict(found).items()} for name, found in self.ways.items()
        }
        rest = {"num_steps": self.num_steps, "num_micro_steps": self.num_micro_steps}
        return {**ways, **rest, "seconds": round(self.seconds, 4)}


def table_of(found: Balance, num_ranks: int) -> Table:
    """Return the figures as a table; the least ratio is marked."""
    table = Table(title=f"Loads of {num_ranks} expert-parallel ranks, {found.num_micro_steps} micro-steps")
    for name in ("", "sum of fullest / sum of mean", "p95", "worst", "most tokens of a rank"):
        table.add_column(name, justify="right" if name else "left")
    best = min(each.ratio for each in found.ways.values())
    for way, says in WAYS.items():
        if way not in found.ways:
            table.add_row(says, *"----")
            continue
        each = found.ways[way]
        figures = (f"{each.ratio:.3f}", f"{each.p95:.2f}", f"{each.worst:.2f}", f"{each.peak_tokens:,}")
        table.add_row(says, *figures, style="bold" if each.ratio == best else None)
    table.caption = f"planned in {found.seconds:.2f} s a step; 1 is even"
    return table


def balance(args: argparse.Namespace) -> Balance:
    """Do what the flags of `r3 balance` ask for.

    Raises:
        R3Error: neither traces nor a simulation, or both; traces that cannot be read; sizes that do not divide.
    """
    if bool(args.traces) == bool(args.simulate):
        raise R3Error("give folders of traces, or --simulate, and not both")
    if args.simulate:
        world = World(skew=args.simulate)
        _check_ranks(args.ep, world.num_experts)
        steps = simulate(world, 2, args.seed)
    else:
        steps = steps_of(sample_folders(args.traces))
        _check_ranks(args.ep, steps[0][1].shape[2])
    return compare(steps, args.ep, args.max_tokens, num_groups=args.groups, seed=args.seed)


def _check_ranks(num_ranks: int, num_experts: int) -> None:
    if num_experts % num_ranks:
        raise LayoutError(f"--ep ({num_ranks}) does not divide the {num_experts} experts of a layer")


def steps_of(folders: Sequence[SampleFolder]) -> list[Step]:
    """Read recorded rollouts; folders that a run has named by their step are taken together, others are one step.

    Raises:
        R3Error: samples that cannot be read, or of another model than the first.
    """
    found: dict[str, list[SampleFolder]] = {}
    for folder in folders:
        name = _STEP.fullmatch(folder.folder.name)
        found.setdefault(name[1] if name else "", []).append(folder)
    steps = []
    for _, own in sorted(found.items()):
        traces = [sample.trace for folder in own for sample in folder[:]]
        tokens = np.array([trace.num_tokens for trace in traces], np.int64)
        steps.append((tokens, count_traces(traces)))
    for number, (_, counts) in enumerate(steps):
        if counts.shape[1:] != steps[0][1].shape[1:]:
            raise LayoutError(
                f"step {number}: (layers, experts) {counts.shape[1:]} != {steps[0][1].shape[1:]} of step 0"
            )
    return steps


def compare(steps: Sequence[Step], num_ranks: int, max_tokens: int, *, num_groups: int = 1, seed: int = 0) -> Balance:
    """Say what each way gives. The first of several steps only serves to place the experts of the second."""
    loads: dict[str, list[npt.NDArray[np.int32]]] = {way: [] for way in WAYS}
    last: Placed | None = None
    seconds: list[float] = []
    for number, (tokens, counts) in enumerate(steps):
        as_is = identity(*counts.shape[1:])
        shuffled = in_order(np.random.default_rng([seed, number]).permutation(len(tokens)), tokens, max_tokens)
        start = time.perf_counter()
        placed = place(summed(shuffled, counts), num_ranks, num_groups=num_groups, seed=seed)
        packed = compose(tokens, counts, placed, num_ranks, max_tokens, seed=seed)
        seconds.append(time.perf_counter() - start)
        before, last = last, placed
        if before is None and len(steps) > 1:
            continue
        ways = {
            "arrival": (in_order(range(len(tokens)), tokens, max_tokens), as_is),
            "shuffled": (shuffled, as_is),
            "packed": (compose(tokens, counts, as_is, num_ranks, max_tokens, seed=seed), as_is),
            "placed": (packed, placed),
        }
        if before is not None:
            ways["placed_last"] = (compose(tokens, counts, before, num_ranks, max_tokens, seed=seed), before)
        for way, (micro_steps, where) in ways.items():
            loads[way].append(rank_loads(summed(micro_steps, counts), where, num_ranks))
    found = {way: evenness(np.concatenate(each)) for way, each in loads.items() if each}
    return Balance(found, len(steps), sum(map(len, loads["placed"])), float(np.median(seconds)))
