"""How many tokens each expert-parallel rank receives, in each layer of each micro-batch: known before the step.

B: micro-batches; M: MoE layers; G: ranks of the expert group; R: expert-parallel ranks; E: experts; T: rows of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.composition import Composed, compose_parts
from r3_adapter.balance.loads import Counts, Placed, rank_loads, summed
from r3_adapter.errors import LayoutError, check_whole
from r3_adapter.repack import RankRoutes

_TRIES = 8


@dataclass(frozen=True)
class Budgets:
    """What each rank receives.

    received: [B, M, R] int64; tokens that the experts of a rank get, each once for each expert of the rank that it has.
    sent: [B, R] int64; tokens times top-k that a rank has itself: what Megatron scales its capacity by.
    layer_ids: [M] global decoder layer of each MoE layer; None where only their order is known.
    num_local_experts: of each rank.
    num_groups: expert groups; those of group g of G have the numbers b with b % G == g.
    """

    received: npt.NDArray[np.int64]
    sent: npt.NDArray[np.int64]
    layer_ids: npt.NDArray[np.int32] | None
    num_local_experts: int = 1
    num_groups: int = 1

    @property
    def peak(self) -> int:
        """The most tokens that a rank receives in a layer of a micro-batch."""
        return int(self.received.max(initial=0))

    def check(self, limit: int) -> None:
        """Refuse a step in which a rank receives more than so many tokens.

        Raises:
            LayoutError: names rank, layer and micro-batch of the most, and how many more there are.
        """
        limit = check_whole("limit", limit, 1, error=LayoutError)
        over = int((self.received > limit).sum())
        if over:
            batch, layer, rank = np.unravel_index(self.received.argmax(), self.received.shape)
            more = f"; {over - 1} more are over it" if over > 1 else ""
            name = f"MoE layer {layer}" if self.layer_ids is None else f"layer {self.layer_ids[layer]}"
            number, group = divmod(int(batch), self.num_groups)
            which = f"expert group {group}" if self.num_groups > 1 else "the expert group"
            raise LayoutError(
                f"rank {rank} of {which} receives {self.peak:,} tokens > {limit:,} in {name} of micro-batch "
                f"{number}{more}"
            )

    def capacity_factor(self, multiple: int = 1) -> float:
        """Return the least `moe_expert_rank_capacity_factor` with which no rank overflows; 0 if nothing is sent.

        multiple: to which the tokens of each expert are padded, such as 16 or 32 with FP8; at most so many are added.

        Source: megatron/core/transformer/moe/token_dispatcher.py@0.19.2:_HybridEPManager.setup_metadata: a rank's
            tokens are at most int(T * topk * factor), rounded up to the multiple.
        """
        least = self.received.max(axis=1, initial=0) + self.num_local_experts * (multiple - 1)
        # A hair above, for int() of the product rounds down.
        return float(_over(least, self.sent).max(initial=0.0)) * (1 + 1e-9)

    def stash_factor(self, in_flight: int, page_size: int = 64) -> float:
        """Return the least `moe_paged_stash_buffer_size_factor_cuda` with which no page is missing.

        in_flight: micro-batches whose backward pass is still to come, at most; consecutive ones. Megatron makes the
            buffer for so many, of T * topk tokens in each layer, times the factor (a positive one).

        Source: megatron/core/transformer/moe/paged_stash.py@0.19.2:PagedStashManager: tokens of all layers in flight,
            in pages of `moe_paged_stash_page_size` for each of them.
        """
        in_flight = min(check_whole("in_flight", in_flight, 1, error=LayoutError), max(len(self.received), 1))
        page_size = check_whole("page_size", page_size, 1, error=LayoutError)
        pages = (-(-self.received // page_size) * page_size).sum(axis=1)
        most = _windows(pages, in_flight).max(axis=0, initial=0)
        even = _windows(self.sent * self.received.shape[1], in_flight).max(axis=0, initial=0)
        return float(_over(most, even).max(initial=0.0))


def _over(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    if ((whole == 0) & (part > 0)).any():
        raise LayoutError("a rank without tokens of its own receives some: no factor of its own is enough")
    found: npt.NDArray[np.float64] = np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
    return found


def _windows(values: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """Return the sums of so many consecutive rows of [B, R]."""
    sums = np.concatenate([np.zeros((1, values.shape[1]), np.int64), values.cumsum(axis=0)])
    found: npt.NDArray[np.int64] = sums[width:] - sums[:-width]
    return found


def budgets_of_routes(routes: Sequence[Sequence[RankRoutes]], num_ranks: int) -> Budgets:
    """Return what ranks receive of the very rows that they are given, padding included.

    routes: by micro-batch, those of each rank of the expert group in its order, expert-tensor ranks next to each other.
    num_ranks: expert-parallel ranks; each receives what all ranks of the group send to its experts.

    Raises:
        LayoutError: none, ranks of several layers, or rows that routers route themselves: nobody knows where they go.
    """
    if not routes or not routes[0]:
        raise LayoutError("no routes: there is nothing to count")
    for number, batch in enumerate(routes):
        for rank, each in enumerate(batch):
            if each.num_live:
                raise LayoutError(f"micro-batch {number}, rank {rank}: {each.num_live} rows are routed live")
            if not np.array_equal(each.layer_ids, routes[0][0].layer_ids):
                raise LayoutError(f"micro-batch {number}, rank {rank}: layers are not those of the first")
    counts = np.stack([[each.counts for each in batch] for batch in routes])
    num_batches, size, layers, experts = counts.shape
    if num_ranks < 1 or size % num_ranks or experts % num_ranks:
        raise LayoutError(f"num_ranks ({num_ranks}) does not divide {size} ranks and {experts} experts")
    received = counts.sum(axis=1).reshape(num_batches, layers, num_ranks, -1).sum(axis=3)
    # Of expert-tensor ranks the one with the fewest tokens sends the least.
    own = np.array([[each.topk_ids.shape[1] * each.topk_ids.shape[2] for each in batch] for batch in routes], np.int64)
    sent = own.reshape(num_batches, num_ranks, -1).min(axis=2)
    return Budgets(received, sent, routes[0][0].layer_ids, experts // num_ranks)


def budgets_of_counts(
    composed: Composed,
    counts: Counts,
    placed: Placed,
    num_ranks: int,
    *,
    layer_ids: npt.NDArray[np.int32] | None = None,
) -> Budgets:
    """Return what ranks receive of composed samples, in micro-steps of all parts together; padding comes on top.

    counts: [S, M, E] of samples. placed: [M, E]. layer_ids: [M], where they are known.
    """
    received = rank_loads(summed(composed.steps(), counts), placed, num_ranks).astype(np.int64)
    # Each rank has as many tokens as the others, or a part has: the least of them.
    parts = np.zeros((composed.num_steps, composed.num_parts), np.int64)
    np.add.at(parts, (composed.step_of, composed.part_of), counts[:, 0].sum(axis=1, dtype=np.int64))
    sent = parts.min(axis=1)[:, None] * composed.num_parts // num_ranks
    own = np.repeat(sent, num_ranks, axis=1)
    return Budgets(received, own, layer_ids, counts.shape[2] // num_ranks, composed.num_groups)


def compose_within(
    limit: int,
    tokens: npt.NDArray[np.int64],
    counts: Counts,
    placed: Placed,
    num_ranks: int,
    max_tokens: int,
    *,
    num_parts: int = 1,
    num_groups: int = 1,
    layer_ids: npt.NDArray[np.int32] | None = None,
    seed: int = 0,
) -> tuple[Composed, Budgets]:
    """Compose a step in which no rank receives more than so many tokens: with smaller micro-steps where it must be.

    Raises:
        LayoutError: there is none within eight tries; names rank, layer and micro-batch of the last.
    """
    most = max_tokens
    for last in reversed(range(_TRIES)):
        composed = compose_parts(
            tokens, counts, placed, num_ranks, most, num_parts=num_parts, num_groups=num_groups, seed=seed
        )
        budgets = budgets_of_counts(composed, counts, placed, num_ranks, layer_ids=layer_ids)
        longest = int(tokens.max(initial=0))
        if budgets.peak <= limit or last == 0 or most <= longest // 2:
            break
        most = max(1, int(most * min(0.95, limit / budgets.peak)))
    try:
        budgets.check(limit)
    except LayoutError as error:
        size = np.bincount(composed.step_of, minlength=composed.num_steps)[
            np.unravel_index(budgets.received.argmax(), budgets.received.shape)[0]
        ]
        raise LayoutError(f"{error}; it has {size} samples, with max_tokens ({most}) from {max_tokens} on") from error
    return composed, budgets
