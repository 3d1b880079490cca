"""Merge what the ranks of a rollout engine captured of one sample: stages with some layers, ranks with some tokens."""

from collections.abc import Sequence

import numpy as np

from r3_adapter.errors import TraceError
from r3_adapter.repack import RankRoutes, collect
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace


def merge_shards(shards: Sequence[RoutingTrace], *, layer_ids: Sequence[int]) -> RoutingTrace:
    """Return the trace that the shards of a sample hold together; each token and layer is in exactly one of them.

    A shard says by itself what it holds: its layers, and the tokens that are captured in it. So pipeline stages,
    which have different layers of the same tokens, merge as ranks do that have different tokens of the same layers,
    and as any mixture does.

    Args:
        shards: all with the tokens of the whole sample.
        layer_ids: [M] global decoder layer of each MoE layer of the model, increasing.

    Raises:
        TraceError: No shards, shards of several samples or models, a token and layer that no shard holds or more than
            one, except for the last token, which need not be captured; shards that disagree on a token's version.
        LayoutError: A layer that is none of layer_ids.
    """
    if not shards:
        raise TraceError("no shards to merge")
    first = shards[0]
    for number, shard in enumerate(shards):
        for name in ("num_experts", "topk", "num_tokens", "model"):
            if (have := getattr(shard, name)) != (want := getattr(first, name)):
                raise TraceError(f"shard {number}: {name} ({have}) != {want} of shard 0")
        other = np.flatnonzero(shard.token_ids != first.token_ids)
        if len(other):
            at = other[0]
            raise TraceError(f"shard {number}: token id {shard.token_ids[at]} at {at} != {first.token_ids[at]}")
    # The token that was sampled last was not fed forward on any rank.
    stop = first.num_tokens
    if stop and not any(shard.captured[-1] for shard in shards):
        stop -= 1
    held = [_rows_of(shard) for shard in shards]
    (trace,) = collect(held, [first.token_ids[:stop]], layer_ids=layer_ids, num_experts=first.num_experts)
    if stop == first.num_tokens:
        return trace
    nothing = np.zeros((1, *trace.topk_ids.shape[1:]), trace.topk_ids.dtype)
    return RoutingTrace(
        np.concatenate([trace.topk_ids, nothing]),
        first.token_ids,
        np.append(trace.version_ids, np.int32(NOT_CAPTURED)),
        trace.layer_ids,
        trace.num_experts,
        trace.weight_versions,
        trace.model,
    )


def _rows_of(shard: RoutingTrace) -> RankRoutes:
    """Return the captured rows of a shard, and where in the sample they lie."""
    rows = np.flatnonzero(shard.captured)
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(rows))
    zeros, ones = np.zeros_like(starts), np.ones_like(starts)
    segments = np.stack([zeros, rows[starts], lengths, starts, ones], axis=1)
    return RankRoutes(
        topk_ids=np.ascontiguousarray(shard.topk_ids[rows].transpose(1, 0, 2)),
        row_versions=np.ascontiguousarray(shard.version_ids[rows]),
        weight_versions=shard.weight_versions,
        layer_ids=shard.layer_ids,
        segments=np.ascontiguousarray(segments, dtype=np.int64),
        num_experts=shard.num_experts,
        model=shard.model,
    )
