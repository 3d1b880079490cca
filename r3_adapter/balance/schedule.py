"""A schedule of micro-batches for a framework that shares samples out over data-parallel ranks: one plain function.

S: samples; L: MoE layers; E: experts of a layer; D: data-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.composition import compose_parts
from r3_adapter.balance.loads import Counts, Placed, identity, rank_loads, summed
from r3_adapter.errors import LayoutError, check_whole

Schedule = list[list[list[int]]]
"""By data-parallel rank, the samples of each of its micro-batches; all ranks have as many of these."""


def schedule(
    tokens: Sequence[int] | npt.NDArray[np.int64],
    counts: Counts,
    *,
    num_ranks: int,
    dp_size: int,
    num_parts: int,
    max_tokens: int,
    multiple: int = 1,
    placed: Placed | None = None,
    seed: int = 0,
) -> Schedule:
    """Return which samples each data-parallel rank computes together, so that the loads of its experts are even.

    The same arguments give the same schedule, so one process or all of them may call it. Samples of a prompt are not
    kept together: the loss must be a mean over the step.

    tokens: [S]. counts: [S, L, E] int32, as `count_traces` gives them.
    num_ranks: expert-parallel ranks. num_parts: data-parallel ranks of an expert group; ranks of a group are next to
        each other.
    max_tokens: of a micro-batch of a rank; a longer sample has one for itself.
    multiple: of which the number of a rank's micro-batches is one, for interleaved pipelines.
    placed: [L, E]; default: experts as the checkpoint has them.

    Raises:
        LayoutError: sizes that do not fit together, or too few samples.
    """
    dp_size = check_whole("dp_size", dp_size, 1, error=LayoutError)
    num_parts = check_whole("num_parts", num_parts, 1, error=LayoutError)
    multiple = check_whole("multiple", multiple, 1, error=LayoutError)
    if dp_size % num_parts:
        raise LayoutError(f"num_parts ({num_parts}) does not divide dp_size ({dp_size})")
    groups = dp_size // num_parts
    where = identity(*counts.shape[1:]) if placed is None else placed
    composed = compose_parts(
        np.asarray(tokens, np.int64),
        counts,
        where,
        num_ranks,
        max_tokens,
        num_parts=num_parts,
        num_groups=groups * multiple,
        seed=seed,
    )
    found = replace(composed, num_groups=groups).micro_batches()
    return [[batch.tolist() for batch in rank] for rank in found]


def fullest_load(
    found: Schedule, counts: Counts, *, num_ranks: int, num_parts: int, placed: Placed | None = None
) -> tuple[int, float]:
    """Return the sum of the fullest ranks' loads of a schedule, and that of the mean ones.

    Ranks of a group compute their micro-batches of one number together.
    """
    steps = [
        [sample for batch in batches for sample in batch]
        for group in range(0, len(found), num_parts)
        for batches in zip(*found[group : group + num_parts], strict=True)
    ]
    where = identity(*counts.shape[1:]) if placed is None else placed
    loads = rank_loads(summed(steps, counts), where, num_ranks)
    return int(loads.max(axis=2).sum(dtype=np.int64)), float(loads.mean(axis=2).sum())
