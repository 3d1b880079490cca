"""Which samples go into a micro-step of an expert group together, by the loads that their routes make.

S: samples; L: MoE layers; E: experts of a layer; R: ranks that share them out.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from r3_adapter import _core
from r3_adapter.balance.loads import Counts, Placed, rank_loads
from r3_adapter.errors import LayoutError, check_whole

Steps = list[npt.NDArray[np.int64]]
"""The samples of each micro-step."""
NUM_MOVES = 60000
SPARE = 1.02
"""Room over what all samples need: without any, hardly a sample could be moved."""


def in_order(order: Sequence[int] | npt.NDArray[np.integer], tokens: npt.NDArray[np.int64], max_tokens: int) -> Steps:
    """Fill one micro-step after the other with samples in an order, as a loop does that knows no loads.

    tokens: [S]. max_tokens: of a micro-step; a longer sample has one for itself.
    """
    steps: list[list[int]] = []
    room = 0
    for sample in map(int, order):
        if not steps or tokens[sample] > room:
            steps.append([])
            room = max_tokens
        steps[-1].append(sample)
        room -= int(tokens[sample])
    return [np.array(step) for step in steps]


def compose(
    tokens: npt.NDArray[np.int64],
    counts: Counts,
    placed: Placed,
    num_ranks: int,
    max_tokens: int,
    *,
    seed: int = 0,
    num_moves: int = NUM_MOVES,
) -> Steps:
    """Put samples together so that in each micro-step and layer the ranks get about as many tokens.

    The same arguments give the same result on every rank. Groups of one prompt are not kept together, so the loss must
    be a mean over the tokens, or samples, of the whole step.

    tokens: [S] int64. counts: [S, L, E] int32. placed: [L, E].
    max_tokens: of a micro-step of the expert group, all its ranks together; a longer sample has one for itself.

    Raises:
        LayoutError: Sizes that do not fit together.
    """
    max_tokens = check_whole("max_tokens", max_tokens, error=LayoutError)
    if max_tokens < 1:
        raise LayoutError(f"max_tokens ({max_tokens}) < 1: no sample fits")
    if len(tokens) != len(counts):
        raise LayoutError(f"{len(tokens)} lengths of samples != {len(counts)} counts of samples")
    by_rank = rank_loads(counts, placed, num_ranks).transpose(0, 2, 1)
    step_of = np.empty(len(tokens), np.int32)
    try:
        num_steps = _core.compose(
            loads=np.ascontiguousarray(by_rank, dtype=np.float32),
            tokens=np.ascontiguousarray(tokens, dtype=np.int64),
            step_of=step_of,
            num_steps=max(1, -(-int(tokens.sum() * SPARE) // max_tokens)),
            max_tokens=max_tokens,
            seed=seed,
            num_moves=num_moves,
        )
    except ValueError as error:
        raise LayoutError(f"samples cannot be put together: {error}") from error
    steps = [np.flatnonzero(step_of == step) for step in range(num_steps)]
    return [step for step in steps if len(step)]
