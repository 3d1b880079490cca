"""Which samples go into a micro-step of an expert group together, by the loads that their routes make.

S: samples; L: MoE layers; E: experts of a layer; R: ranks that share them out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from r3_adapter import _core
from r3_adapter.balance.loads import Counts, Placed
from r3_adapter.errors import LayoutError, check_whole

Steps = list[npt.NDArray[np.int64]]
"""The samples of each micro-step."""
NUM_MOVES = 150000
SPARE = 1.02
"""Room over what all samples need: without any, hardly a sample could be moved."""
ATTENTION = 0.2
"""The time of attention that grows with the square of lengths, over that of the experts, both as even as can be."""


@dataclass(frozen=True)
class Composed:
    """Where each sample goes.

    step_of: [S] int32; its micro-step, from 0 to num_steps - 1. Expert group g of G has those with step % G == g.
    part_of: [S] int32; which of the group's data-parallel ranks has it.
    """

    step_of: npt.NDArray[np.int32]
    part_of: npt.NDArray[np.int32]
    num_steps: int
    num_groups: int = 1
    num_parts: int = 1

    def steps(self) -> Steps:
        """Return the samples of each micro-step, all parts together."""
        return [np.flatnonzero(self.step_of == step) for step in range(self.num_steps)]

    def micro_batches(self) -> list[Steps]:
        """Return by data-parallel rank the samples of each of its micro-batches, group after group."""
        return [
            [
                np.flatnonzero((self.step_of == step) & (self.part_of == part))
                for step in range(group, self.num_steps, self.num_groups)
            ]
            for group in range(self.num_groups)
            for part in range(self.num_parts)
        ]


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
    attention: float = ATTENTION,
    seed: int = 0,
    num_moves: int = NUM_MOVES,
    num_threads: int = 2,
) -> Steps:
    """Return the samples of each micro-step of one expert group, as `compose_parts` puts them together.

    max_tokens: of a micro-step of the expert group, all its ranks together; a longer sample has one for itself.
    """
    composed = compose_parts(
        tokens,
        counts,
        placed,
        num_ranks,
        max_tokens,
        attention=attention,
        seed=seed,
        num_moves=num_moves,
        num_threads=num_threads,
    )
    return composed.steps()


def compose_parts(
    tokens: npt.NDArray[np.int64],
    counts: Counts,
    placed: Placed,
    num_ranks: int,
    max_tokens: int,
    *,
    num_parts: int = 1,
    num_groups: int = 1,
    num_steps: int | None = None,
    attention: float = ATTENTION,
    seed: int = 0,
    num_moves: int = NUM_MOVES,
    num_threads: int = 2,
) -> Composed:
    """Put samples together so that in each micro-step and layer the ranks get about as many tokens.

    The same arguments give the same result on every rank, whatever num_threads is. Groups of one prompt are not kept
    together, so the loss must be a mean over the tokens, or samples, of the whole step.

    tokens: [S] int64. counts: [S, L, E] int32. placed: [L, E].
    max_tokens: of a part; a longer sample has one for itself.
    num_parts: data-parallel ranks of an expert group; each has a part of a micro-step, and none is empty.
    num_groups: expert groups; the number of micro-steps is a multiple of it.
    num_steps: micro-steps of all groups, a multiple of num_groups; there are more if samples do not fit into as many.
        Default: as few as the samples need.
    attention: the weight of the second objective, which is the squares of the lengths of the part that has most of
        them: the time of attention that grows so, over that of the experts, both as even as can be.

    Raises:
        LayoutError: Sizes that do not fit together, or too few samples for all parts.
    """
    max_tokens, num_parts, num_groups = (
        _at_least_one(name, number)
        for name, number in (("max_tokens", max_tokens), ("num_parts", num_parts), ("num_groups", num_groups))
    )
    if len(tokens) != len(counts):
        raise LayoutError(f"{len(tokens)} lengths of samples != {len(counts)} counts of samples")
    step_of, part_of = np.empty((2, len(tokens)), np.int32)
    # No more than can be filled.
    wanted = min(-(-int(tokens.sum() * SPARE) // (max_tokens * num_parts)), len(tokens) // num_parts)
    if num_steps is not None:
        wanted = _at_least_one("num_steps", num_steps)
        if wanted % num_groups:
            raise LayoutError(f"num_steps ({wanted}) is not a multiple of num_groups ({num_groups})")
    try:
        found = _core.compose(
            counts=np.ascontiguousarray(counts),
            expert_at=np.ascontiguousarray(placed),
            tokens=np.ascontiguousarray(tokens, dtype=np.int64),
            step_of=step_of,
            part_of=part_of,
            num_ranks=check_whole("num_ranks", num_ranks, error=LayoutError),
            num_steps=max(1, -(-wanted // num_groups)) * num_groups,
            num_groups=num_groups,
            num_parts=num_parts,
            max_tokens=max_tokens,
            attention=attention,
            seed=seed,
            num_moves=num_moves,
            num_threads=num_threads,
        )
    except ValueError as error:
        raise LayoutError(f"samples cannot be put together: {error}") from error
    if len(set(zip(step_of, part_of, strict=True))) < found * num_parts:
        raise LayoutError(
            f"{len(tokens)} samples cannot fill {found} micro-steps of {num_parts} parts: {num_groups} expert "
            f"groups and max_tokens ({max_tokens}) of a part need as many"
        )
    return Composed(step_of, part_of, found, num_groups, num_parts)


def _at_least_one(name: str, number: int) -> int:
    if (checked := check_whole(name, number, error=LayoutError)) < 1:
        raise LayoutError(f"{name} ({checked}) < 1")
    return checked
