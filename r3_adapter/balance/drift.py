"""How fast the loads of experts change from step to step, and how long a placement stays good.

L: MoE layers; E: experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.composition import compose
from r3_adapter.balance.loads import Evenness, Placed, evenness, identity, rank_loads, summed
from r3_adapter.balance.steps import Step

MOST_AGO = 32


@dataclass(frozen=True)
class Moved:
    """The part of a layer's tokens that another expert gets than in the step before: its mean over layers, and most."""

    mean: float
    most: float
    layer: int


def moved_between(steps: Sequence[Step]) -> list[Moved]:
    """Return what has moved from each step to the next; layers are counted from 0 among the MoE layers."""
    shares = [_shares(counts.sum(axis=0, dtype=np.int64)) for _, counts in steps]
    found = []
    for before, after in pairwise(shares):
        moved = np.abs(after - before).sum(axis=1) / 2
        found.append(Moved(float(moved.mean()), float(moved.max()), int(moved.argmax())))
    return found


def _shares(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    total = counts.sum(axis=1, keepdims=True)
    share: npt.NDArray[np.float64] = np.divide(
        counts, total, out=np.full(counts.shape, 1 / counts.shape[1]), where=total > 0
    )
    return share


def placed_ago(
    steps: Sequence[Step], placements: Sequence[Placed], num_ranks: int, max_tokens: int, *, seed: int = 0
) -> list[tuple[int, Evenness]]:
    """Return (k, what the last step has with the placement of k steps before), packed, for k from 0 to 32.

    placements: [L, E] of each step. The last entry, of k -1, is without a placement: what there is to lose.
    """
    tokens, counts = steps[-1]
    found = []
    for ago, placed in enumerate(reversed(placements[-MOST_AGO - 1 :])):
        packed = compose(tokens, counts, placed, num_ranks, max_tokens, seed=seed)
        found.append((ago, evenness(rank_loads(summed(packed, counts), placed, num_ranks))))
    as_is = identity(*counts.shape[1:])
    packed = compose(tokens, counts, as_is, num_ranks, max_tokens, seed=seed)
    return [*found, (-1, evenness(rank_loads(summed(packed, counts), as_is, num_ranks)))]
