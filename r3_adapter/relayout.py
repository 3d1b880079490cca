"""From the shards of one layout straight to a shard of another, without whole traces in between.

S: tokens of a sample; M: MoE layers; K: experts a token; E: experts; T: tokens of a rank.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter import _core
from r3_adapter.arena import Arena, aligned_empty
from r3_adapter.errors import LayoutError, TraceError
from r3_adapter.layout import Packing, ParallelLayout, local_num_tokens, local_segments
from r3_adapter.repack import (
    LIVE,
    PADDING,
    RankRoutes,
    find_layers,
    local_dtype,
    one_model,
    rank_tokens,
    rename_versions,
    unite,
    whole_layers,
)
from r3_adapter.trace import ids_dtype


def relayout(
    shards: Sequence[RankRoutes],
    token_ids: Sequence[npt.NDArray[np.int32]],
    packing: Packing,
    layout: ParallelLayout,
    rank: int,
    *,
    layer_ids: Sequence[int] | npt.NDArray[np.integer],
    samples: Sequence[int] | None = None,
    input_ids: npt.NDArray[np.integer] | None = None,
    dtype: npt.DTypeLike = np.int16,
    arena: Arena | None = None,
) -> RankRoutes:
    """Return what a rank of another layout needs: `repack` of `collect`, but only shards that have a part of it count.

    Versions are named as in `repack`, but in the order of the shards' own tables.

    Args:
        shards: of one copy of the source micro-batch; a shard may be left out if the rank needs nothing of it.
        token_ids: [S] int32 of each sample of the shards.
        packing: how the samples lie in the new micro-batch.
        layout: sizes of the new parallel dimensions.
        rank: global rank in the new layout.
        layer_ids: [M_local] global decoder layer of each MoE layer of the rank, in the order of its routers.
        samples: the shards' number of each sample of the new micro-batch; default: the same samples.
        input_ids: as in `repack`.
        dtype: of the ids; uint8, uint16, int16, int32 or int64.
        arena: as in `repack`.

    Raises:
        TraceError: a token and layer that no shard or more than one holds, an id out of range or twice in a row, shards
            that disagree, tokens that are not those of the micro-batch; names sample and position.
        LayoutError: shards, layers or a dtype that do not fit the packing, the layout or each other.
    """
    chosen = list(range(len(token_ids)) if samples is None else samples)
    _check_sources(shards, token_ids, chosen, packing)
    num_experts, topk = shards[0].num_experts, shards[0].topk_ids.shape[2]
    if num_experts % layout.ep:
        raise LayoutError(f"ep ({layout.ep}) does not divide num_experts ({num_experts})")
    coords, num_rows = layout.coords(rank), local_num_tokens(packing, layout)
    segments = local_segments(packing, layout, coords)
    tokens = [token_ids[sample] for sample in chosen]
    if input_ids is not None:
        _check_tokens(tokens, segments, rank_tokens(input_ids, packing, layout, coords.tp_rank))
    layers = whole_layers(layer_ids)
    find_layers(layers, layers)
    versions, maps = unite([shard.weight_versions for shard in shards])
    empty = aligned_empty if arena is None else arena.empty
    routes = RankRoutes(
        topk_ids=empty((len(layers), num_rows, topk), local_dtype(dtype, num_experts)),
        row_versions=empty((num_rows,), np.int32),
        weight_versions=versions,
        layer_ids=layers,
        segments=segments,
        num_experts=num_experts,
        model=one_model(shards),
    )
    _fill(routes, shards, [rename_versions(*pair) for pair in zip(shards, maps, strict=True)], tokens, chosen)
    _pad(routes, layout.ep)
    _check_ids(routes)
    return routes


def _check_sources(
    shards: Sequence[RankRoutes], token_ids: Sequence[npt.NDArray[np.int32]], chosen: list[int], packing: Packing
) -> None:
    if not shards:
        raise LayoutError("no shards")
    for number, shard in enumerate(shards):
        found = (shard.num_experts, shard.topk_ids.shape[2])
        if found != (want := (shards[0].num_experts, shards[0].topk_ids.shape[2])):
            raise TraceError(f"num_experts and topk {found} of shard {number} != {want} of shard 0")
    if len(chosen) != packing.num_samples:
        raise LayoutError(f"{len(chosen)} samples != {packing.num_samples} samples of the packing")
    for place, sample in enumerate(chosen):
        if not 0 <= sample < len(token_ids):
            raise LayoutError(f"sample ({sample}) is none of the {len(token_ids)} samples of the shards")
        if len(token_ids[sample]) > packing.rooms[place]:
            raise LayoutError(
                f"{len(token_ids[sample])} tokens of sample {sample} > room ({packing.rooms[place]}) in the packing"
            )


def _check_tokens(
    tokens: Sequence[npt.NDArray[np.int32]], segments: npt.NDArray[np.int64], expected: npt.NDArray[np.int64]
) -> None:
    for sample, pos, length, row, stride in segments.tolist():
        found = tokens[sample][pos : pos + length]
        want = expected[row::stride][: len(found)]
        for i in np.flatnonzero(found != want)[:1].tolist():
            raise TraceError(
                f"token ({found[i]}) of sample {sample} at position {pos + i} != {want[i]} of the micro-batch at local "
                f"row {row + i * stride}"
            )


Overlap = tuple[slice, slice, int, int]
"""Rows of the target, rows of the source, sample of the target, first position."""


def _overlaps(target: npt.NDArray[np.int64], source: npt.NDArray[np.int64], chosen: list[int]) -> Iterator[Overlap]:
    """Yield where two tables of segments have the same tokens."""
    of_sample: dict[int, list[list[int]]] = {}
    for other_sample, *rest in source.tolist():
        of_sample.setdefault(other_sample, []).append(rest)
    for sample, pos, length, row, stride in target.tolist():
        for other_pos, other_length, other_row, other_stride in of_sample.get(chosen[sample], []):
            begin, end = max(pos, other_pos), min(pos + length, other_pos + other_length)
            if begin < end:
                first, other_first = row + (begin - pos) * stride, other_row + (begin - other_pos) * other_stride
                yield (
                    slice(first, first + (end - begin - 1) * stride + 1, stride),
                    slice(other_first, other_first + (end - begin - 1) * other_stride + 1, other_stride),
                    sample,
                    begin,
                )


def _fill(
    routes: RankRoutes,
    shards: Sequence[RankRoutes],
    versions: Sequence[npt.NDArray[np.int32]],
    tokens: Sequence[npt.NDArray[np.int32]],
    chosen: list[int],
) -> None:
    """Copy what the shards have; the rest of the rows must be padding."""
    at = {layer: m for m, layer in enumerate(routes.layer_ids.tolist())}
    held = np.zeros(routes.topk_ids.shape[:2], dtype=np.bool_)
    known = np.zeros(len(routes.row_versions), dtype=np.bool_)
    routes.row_versions[:] = PADDING
    for number, (shard, shard_versions) in enumerate(zip(shards, versions, strict=True)):
        pairs = [(at[layer], m) for m, layer in enumerate(shard.layer_ids.tolist()) if layer in at]
        for rows, source_rows, sample, pos in _overlaps(routes.segments, shard.segments, chosen):
            found = shard_versions[source_rows]
            padding = np.arange(pos, pos + len(found)) >= len(tokens[sample])
            place = f"of sample {sample} from position {pos} on in shard {number}"
            if np.any(padding != (found == PADDING)) or np.any(found < PADDING):
                raise TraceError(f"row versions {place} do not say padding from position {len(tokens[sample])} on")
            if np.any(known[rows] & (routes.row_versions[rows] != found)):
                raise TraceError(f"row versions {place} differ from those in an earlier shard")
            known[rows], routes.row_versions[rows] = True, found
            for m, source_m in pairs:
                if np.any(held[m, rows] & ~padding):
                    raise TraceError(f"layer {routes.layer_ids[m]} {place} is held twice")
                held[m, rows] = True
                ids = shard.topk_ids[source_m, source_rows]
                wrong = np.any((ids < 0) | (ids >= routes.num_experts), axis=1) & (found >= 0)
                if np.any(wrong):
                    row = int(np.flatnonzero(wrong)[0])
                    raise TraceError(f"ids {ids[row].tolist()} of layer {routes.layer_ids[m]} {place} out of range")
                routes.topk_ids[m, rows] = _marked(ids, found, routes.topk_ids.dtype)
    _check_complete(routes, held, tokens)


def _marked(ids: npt.NDArray[Any], versions: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return [n, K] ids in the target's dtype, with all bits set in live rows."""
    marked = ids.astype(dtype)
    marked[versions == LIVE] = np.array(-1).astype(dtype)
    return marked


def _check_complete(routes: RankRoutes, held: npt.NDArray[np.bool_], tokens: Sequence[npt.NDArray[np.int32]]) -> None:
    for sample, pos, length, row, stride in routes.segments.tolist():
        length = min(length, max(0, len(tokens[sample]) - pos))  # noqa: PLW2901
        gaps = np.argwhere(~held[:, row::stride][:, :length])
        for m, i in gaps[:1].tolist():
            raise TraceError(f"no shard holds sample {sample}, token {pos + i}, layer {routes.layer_ids[m]}")


def _pad(routes: RankRoutes, ep: int) -> None:
    """Fill padding rows as `repack` does: their ids walk over the experts, and the expert parallel ranks take turns."""
    rows = np.flatnonzero(routes.row_versions == PADDING)
    topk, experts_of_rank = routes.topk_ids.shape[2], routes.num_experts // ep
    step = (np.arange(len(rows) * topk) % routes.num_experts).reshape(len(rows), topk)
    routes.topk_ids[:, rows] = step % ep * experts_of_rank + step // ep


def _check_ids(routes: RankRoutes) -> None:
    rows = np.flatnonzero(routes.row_versions >= 0)
    for m, layer in enumerate(routes.layer_ids.tolist()):
        ids = routes.topk_ids[m, rows].astype(ids_dtype(routes.num_experts))[:, None]
        where = _core.find_bad_row(ids, np.zeros(len(rows), dtype=np.int32), routes.num_experts)
        if where is not None:
            raise TraceError(
                f"layer {layer}, local row {rows[where[0]]}: ids {ids[where[0], 0].tolist()} are not distinct"
            )
