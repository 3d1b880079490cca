"""From the traces of a micro-batch to what a rank's MoE layers need, and back.

S: tokens of a sample; M: MoE layers of a trace; K: experts a token; E: experts; T: tokens of a rank; N: segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from r3_adapter import _core
from r3_adapter.arena import Arena, aligned_empty
from r3_adapter.errors import LayoutError, TraceError, check_choice, check_whole, show
from r3_adapter.layout import Packing, ParallelLayout, local_num_tokens, local_segments
from r3_adapter.trace import ModelId, RoutingTrace, ids_dtype

LIVE = -1
PADDING = -2

LastRow = Literal["live", "balanced"]
"""What the last token of a sample gets if it has no route: its router's own choice, or balanced experts as padding."""


@dataclass(frozen=True, eq=False)
class RankRoutes:
    """The routes of a micro-batch that one rank's MoE layers need.

    topk_ids: [M_local, T, K] uint8, uint16, int16, int32 or int64, C-contiguous; distinct expert ids in a route; all
        bits set (-1 where signed) in a live row; ids that load experts evenly in a padding row.
    row_versions: [T] int32; index into weight_versions of a replayed row, LIVE, or PADDING, which is also that of a
        sample's last token with `last_row="balanced"`.
    weight_versions: names of the weights that computed the rows.
    layer_ids: [M_local] int32; global decoder layer of each local MoE layer.
    segments: [N, 5] int64; which tokens lie at which rows, as `local_segments` gives them.
    num_experts: E.
    model: of the traces that the routes are of; None where it is not known.
    slot_of: [M_local, E] int32; where each expert lies, in rows of layer_ids: ids are slots then, not experts. None
        where experts lie in their order.
    """

    topk_ids: npt.NDArray[Any]
    row_versions: npt.NDArray[np.int32]
    weight_versions: tuple[str, ...]
    layer_ids: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int64]
    num_experts: int
    model: ModelId | None = None
    slot_of: npt.NDArray[np.int32] | None = None
    _counts: npt.NDArray[np.int64] | None = field(default=None, init=False, repr=False)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[M_local, E] int64; tokens of each expert, or slot, replayed and padding; where live rows go is not known.

        Counted when first asked for, unless `repack` was asked to count in its own pass.

        Raises:
            TraceError: an id that is none of the experts, in routes that `repack` did not make.
        """
        if self._counts is None:
            counts = np.empty((len(self.topk_ids), self.num_experts), dtype=np.int64)
            try:
                _core.count_experts(topk_ids=self.topk_ids, row_versions=self.row_versions, counts=counts)
            except ValueError as error:
                raise TraceError(f"{error}") from error
            object.__setattr__(self, "_counts", counts)
            return counts
        return self._counts

    @property
    def num_interleaved(self) -> int:
        """Number of samples whose tokens take turns in the rows: b of a padded batch, 1 of a packed one."""
        return int(self.segments[0, 4]) if len(self.segments) else 1

    @property
    def num_replayed(self) -> int:
        """Number of rows with a route."""
        return int(np.count_nonzero(self.row_versions >= 0))

    @property
    def num_live(self) -> int:
        """Number of rows that the router routes itself."""
        return int(np.count_nonzero(self.row_versions == LIVE))

    @property
    def num_padding(self) -> int:
        """Number of rows with balanced experts: without a token, or of a last one with `last_row="balanced"`."""
        return int(np.count_nonzero(self.row_versions == PADDING))


def repack(
    traces: Sequence[RoutingTrace],
    packing: Packing,
    layout: ParallelLayout,
    rank: int,
    *,
    layer_ids: Sequence[int] | npt.NDArray[np.integer],
    input_ids: npt.NDArray[np.integer] | None = None,
    dtype: npt.DTypeLike = np.int16,
    num_threads: int = 1,
    count: bool = False,
    arena: Arena | None = None,
    last_row: LastRow = "live",
    slot_of: npt.NDArray[np.int32] | None = None,
) -> RankRoutes:
    """Return what a rank's MoE layers need of the traces of a micro-batch, in one pass.

    Args:
        traces: one for each sample of the packing.
        packing: how the samples lie in the micro-batch.
        layout: sizes of the trainer's parallel dimensions.
        rank: global rank.
        layer_ids: [M_local] global decoder layer of each MoE layer of this rank, in the order of its routers.
        input_ids: [b, s_local] integers in "sbhd", [t_local] in "thd"; the micro-batch's tokens on this context
            parallel rank, as Megatron's embedding gets them; compared with the traces' tokens except in padding.
        dtype: of the ids; uint8, uint16, int16, int32 or int64.
        num_threads: threads to copy with.
        count: fill `counts` in the same pass; without it they are counted when they are first asked for.
        arena: memory for the ids and the row versions that is used again; default: new memory each time.
        last_row: "balanced": the last token of a trace, if it has no route, is given experts as padding is, and counted
            as padding; `collect` does not take such shards back. Other rows without a route are live.
        slot_of: [M_local, E] int32, C-contiguous; where each expert of the rank's layers lies, a permutation for each;
            ids are then slots. `collect` makes experts of them again.

    Raises:
        TraceError: traces that disagree, or whose tokens are not those of the micro-batch; names sample and position.
        LayoutError: traces, layers or a dtype that do not fit the packing, the layout or the model.
    """
    check_choice("last_row", last_row, LastRow, LayoutError)
    _check_traces(traces, packing)
    coords = layout.coords(rank)
    num_rows = local_num_tokens(packing, layout)
    segments = local_segments(packing, layout, coords)
    local_layers, layer_indices = find_layers(layer_ids, traces[0].layer_ids)
    num_experts = traces[0].num_experts
    if num_experts % layout.ep:
        raise LayoutError(f"ep ({layout.ep}) does not divide num_experts ({num_experts})")
    expected = None if input_ids is None else rank_tokens(input_ids, packing, layout, coords.tp_rank)
    versions, maps = unite([trace.weight_versions for trace in traces])
    empty = aligned_empty if arena is None else arena.empty
    routes = RankRoutes(
        topk_ids=empty((len(local_layers), num_rows, traces[0].topk), local_dtype(dtype, num_experts)),
        row_versions=empty((num_rows,), np.int32),
        weight_versions=versions,
        layer_ids=local_layers,
        segments=segments,
        num_experts=num_experts,
        model=traces[0].model,
        slot_of=slot_of,
    )
    counts = np.empty((len(local_layers), num_experts), dtype=np.int64) if count else None
    try:
        _core.repack(
            topk_ids=[trace.topk_ids for trace in traces],
            version_ids=[trace.version_ids for trace in traces],
            segments=segments,
            layer_indices=layer_indices,
            out=routes.topk_ids,
            row_versions=routes.row_versions,
            counts=counts,
            num_experts=num_experts,
            ep_size=layout.ep,
            token_ids=None if expected is None else [trace.token_ids for trace in traces],
            expected_ids=expected,
            version_maps=maps,
            num_threads=check_whole("num_threads", num_threads, error=LayoutError),
            balance_last=last_row == "balanced",
            slot_of=slot_of,
        )
    except ValueError as error:
        raise TraceError(f"rank {rank}: {error}") from error
    object.__setattr__(routes, "_counts", counts)
    return routes


def collect(
    shards: Sequence[RankRoutes],
    token_ids: Sequence[npt.NDArray[np.int32]],
    *,
    layer_ids: Sequence[int] | npt.NDArray[np.integer],
    num_experts: int,
    num_threads: int = 1,
) -> list[RoutingTrace]:
    """Return the traces that the shards of all ranks hold together: the inverse of `repack`.

    Slots come back as experts. A live row comes back as not captured. weight_versions of a trace names what its rows
    use, in the order of their first use.

    Args:
        shards: of one copy of the micro-batch; each token and layer in exactly one of them.
        token_ids: [S] int32 of each sample; rows of a shard at positions from S on must be padding.
        layer_ids: [M] global decoder layer of each MoE layer of the model, increasing.
        num_experts: E.
        num_threads: threads to copy with.

    Raises:
        TraceError: a token and layer that no shard or more than one holds, an id out of range or twice in a route,
            shards that disagree on the version of a token; names sample, token and layer.
        LayoutError: no shards, or a layer that is none of layer_ids.
    """
    if not shards:
        raise LayoutError("no shards")
    layers = whole_layers(layer_ids)
    layer_indices = [find_layers(shard.layer_ids, layers)[1] for shard in shards]
    topk, model = shards[0].topk_ids.shape[2], one_model(shards)
    versions, maps = unite([shard.weight_versions for shard in shards])
    row_versions = [rename_versions(shard, places) for shard, places in zip(shards, maps, strict=True)]
    topk_ids = [np.empty((len(ids), len(layers), topk), dtype=ids_dtype(num_experts)) for ids in token_ids]
    version_ids = [np.empty(len(ids), dtype=np.int32) for ids in token_ids]
    try:
        _core.collect(
            ids=[shard.topk_ids if shard.slot_of is None else _experts(shard) for shard in shards],
            row_versions=row_versions,
            segments=[shard.segments for shard in shards],
            layer_indices=layer_indices,
            topk_ids=topk_ids,
            version_ids=version_ids,
            layer_ids=layers,
            num_experts=num_experts,
            num_threads=check_whole("num_threads", num_threads, error=LayoutError),
        )
    except ValueError as error:
        raise TraceError(f"{error}") from error
    traces = []
    for sample, (ids, tokens, rows) in enumerate(zip(topk_ids, token_ids, version_ids, strict=True)):
        used, names = _used_versions(rows, versions)
        try:
            traces.append(RoutingTrace(ids, tokens, used, layers, num_experts, names, model))
        except TraceError as error:
            raise TraceError(f"sample {sample}: {error}") from error
    return traces


def _experts(shard: RankRoutes) -> npt.NDArray[Any]:
    """Return the ids of a shard of slots as experts; ids that are no slots stay as they are and are refused later."""
    assert shard.slot_of is not None
    expert_at = np.argsort(shard.slot_of, axis=1)
    ids = shard.topk_ids.astype(np.int64)
    inside = (ids >= 0) & (ids < shard.num_experts)
    layer = np.arange(len(ids))[:, None, None]
    found = np.where(inside, expert_at[layer, np.where(inside, ids, 0)], ids)
    return np.ascontiguousarray(found.astype(shard.topk_ids.dtype))


def one_model(shards: Sequence[RankRoutes]) -> ModelId | None:
    """Return the model that all shards are of.

    Raises:
        TraceError: shards of several models.
    """
    for number, shard in enumerate(shards):
        if shard.model != shards[0].model:
            raise TraceError(f"model {shard.model} of shard {number} != {shards[0].model} of shard 0")
    return shards[0].model


def _check_traces(traces: Sequence[RoutingTrace], packing: Packing) -> None:
    if len(traces) != packing.num_samples:
        raise LayoutError(f"{len(traces)} traces != {packing.num_samples} samples of the packing")
    first = traces[0]
    for sample, trace in enumerate(traces):
        if trace.num_tokens > packing.padded_lengths[sample]:
            raise LayoutError(
                f"trace of {trace.num_tokens} tokens > padded length ({packing.padded_lengths[sample]}) of "
                f"sample {sample}"
            )
        for name in ("num_experts", "topk", "model"):
            if getattr(trace, name) != getattr(first, name):
                raise TraceError(
                    f"{name} ({getattr(trace, name)}) of sample {sample} != {getattr(first, name)} of sample 0"
                )
        if trace.layer_ids is not first.layer_ids and not np.array_equal(trace.layer_ids, first.layer_ids):
            raise TraceError(
                f"layer_ids {trace.layer_ids.tolist()} of sample {sample} != {first.layer_ids.tolist()} of sample 0"
            )


def whole_layers(layer_ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """Return decoder layers as int32.

    Raises:
        LayoutError: one that is no whole number from 0.
    """
    layers = [check_whole("layer_ids", layer, 0, error=LayoutError) for layer in layer_ids]
    if layers and max(layers) >= 1 << 31:
        raise LayoutError(f"layer {max(layers)} >= {1 << 31}")
    return np.array(layers, dtype=np.int32)


def find_layers(
    wanted: Sequence[int] | npt.NDArray[np.integer], known: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the wanted layers and their indices in the known ones."""
    at = {int(layer): place for place, layer in enumerate(known)}
    layers = [check_whole("layer_ids", layer, error=LayoutError) for layer in wanted]
    for layer in layers:
        if layer not in at:
            raise LayoutError(f"layer {layer} is none of the MoE layers {known.tolist()}")
    if len(set(layers)) != len(layers):
        raise LayoutError(f"layer_ids {layers} name a layer twice")
    return np.array(layers, dtype=np.int32), np.array([at[layer] for layer in layers], dtype=np.int64)


def local_dtype(dtype: npt.DTypeLike, num_experts: int) -> np.dtype[Any]:
    """Return the dtype if it can hold E ids and the mark of a live row."""
    try:
        wanted = np.dtype(dtype)
    except TypeError as error:
        raise LayoutError(f"dtype {show(dtype)} is none of uint8, uint16, int16, int32, int64") from error
    if wanted not in (np.uint8, np.uint16, np.int16, np.int32, np.int64):
        raise LayoutError(f"dtype {wanted} is none of uint8, uint16, int16, int32, int64")
    most = np.iinfo(wanted).max + (1 if wanted.kind == "i" else 0)
    if num_experts > most:
        raise LayoutError(
            f"num_experts ({num_experts}) > {most}, the most that {wanted} can hold beside a live row's mark"
        )
    return wanted


def rank_tokens(
    input_ids: npt.NDArray[np.integer], packing: Packing, layout: ParallelLayout, tp_rank: int
) -> npt.NDArray[np.int64]:
    """Return [T] the tokens of the rank's rows: those of its context parallel rank, cut for sequence parallelism."""
    rows, num_samples = packing.num_tokens // layout.cp, packing.num_samples
    want = (num_samples, rows // num_samples) if packing.qkv_format == "sbhd" else (rows,)
    if not isinstance(input_ids, np.ndarray):
        raise LayoutError(f"input_ids ({show(input_ids)}) are no array")
    if input_ids.shape != want or input_ids.dtype.kind not in "iu":
        raise LayoutError(f"input_ids {input_ids.shape} {input_ids.dtype} != {want} integers of a cp rank")
    part = rows // layout.tp
    return np.ascontiguousarray(input_ids.T, dtype=np.int64).reshape(-1)[tp_rank * part : (tp_rank + 1) * part]


def unite(tables: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], list[npt.NDArray[np.int32] | None]]:
    """Return one table of weight versions for all, and the place of each table's names in it; None where they lead."""
    united = tuple(dict.fromkeys(version for table in tables for version in table))
    at = {version: place for place, version in enumerate(united)}
    leading = {table: table == united[: len(table)] for table in set(tables)}
    return united, [
        None if leading[table] else np.array([at[version] for version in table], dtype=np.int32) for table in tables
    ]


def rename_versions(shard: RankRoutes, places: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
    """Return [T] the row versions of a shard as ids into another table; ids below 0 stay as they are.

    Raises:
        TraceError: a version that the shard has no name for.
    """
    ids, known = shard.row_versions, len(shard.weight_versions)
    if np.any(ids >= known):
        raise TraceError(f"version id ({ids.max()}) is not one of the {known} weight versions {shard.weight_versions}")
    return ids if places is None else np.where(ids < 0, ids, places[np.maximum(ids, 0)] if known else ids)


def _used_versions(
    version_ids: npt.NDArray[np.int32], table: tuple[str, ...]
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Return ids into, and the table of, only the versions that are used, in the order of their first use."""
    used, first = np.unique(version_ids[version_ids >= 0], return_index=True)
    used = used[np.argsort(first)]
    places = np.full(len(table) + 1, -1, dtype=np.int32)
    places[used] = np.arange(len(used), dtype=np.int32)
    return places[version_ids], tuple(table[version] for version in used)
