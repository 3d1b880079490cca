"""Where experts lie: a permutation for each layer, from the loads of recorded routes.

B: micro-steps; L: MoE layers; E: experts of a layer.
"""

import numpy as np

from r3_adapter import _core
from r3_adapter.balance.loads import Counts, Placed
from r3_adapter.errors import LayoutError, check_whole

NUM_SWAPS = 16000
"""Tried in each layer: from there on the loads hardly become more even."""


def place(
    loads: Counts,
    num_ranks: int,
    *,
    num_groups: int = 1,
    seed: int = 0,
    num_swaps: int = NUM_SWAPS,
    num_threads: int = 2,
) -> Placed:
    """Return [L, E] the expert of each slot, so that in each micro-step the ranks get about as many tokens.

    The same arguments give the same result wherever it is built for a processor of the same kind.

    loads: [B, L, E] int32, of micro-steps like those to come.
    num_ranks: over which a layer's experts are shared out.
    num_groups: of a router that is limited to groups; experts of a group stay together, since it knows them by place.

    Raises:
        LayoutError: Sizes that do not divide, or loads that are none.
    """
    num_ranks = check_whole("num_ranks", num_ranks, error=LayoutError)
    num_groups = check_whole("num_groups", num_groups, error=LayoutError)
    placed = np.empty(loads.shape[1:], np.int32)
    try:
        _core.place(
            loads=np.ascontiguousarray(loads),
            expert_at=placed,
            num_ranks=num_ranks,
            num_groups=num_groups,
            seed=seed,
            num_swaps=num_swaps,
            num_threads=num_threads,
        )
    except ValueError as error:
        raise LayoutError(f"experts cannot be placed: {error}") from error
    return placed
