"""The same as `_core` and `repack`, slow and readable: the oracle that they are compared with.

It shares no formula with them: where a token is comes from doing to lists of tokens what Megatron does to a batch.
S: tokens of a sample; M: MoE layers of a trace; K: experts a token; E: experts; T: tokens of a rank.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import LayoutError, TraceError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import LIVE, PADDING, LastRow, RankRoutes
from r3_adapter.trace import RoutingTrace, ids_dtype

Token = tuple[int, int]
"""Sample and position."""


def find_bad_route(
    topk_ids: npt.NDArray[Any], version_ids: npt.NDArray[np.int32], num_experts: int
) -> tuple[int, int] | None:
    """Return (token, layer) of the first ids that are no route though captured, or not zero though not captured."""
    for token, layers in enumerate(topk_ids.tolist()):
        for layer, row in enumerate(layers):
            if version_ids[token] < 0:
                good = not any(row)
            else:
                good = len(set(row)) == len(row) and max(row) < num_experts
            if not good:
                return token, layer
    return None


def tokens_of_cp_rank(packing: Packing, cp: int, cp_rank: int) -> list[list[Token]]:
    """Return the tokens of a context parallel rank, a list for each sequence row.

    A contiguous cut deals equal parts out in order: of each sequence, or of the one stream of all.

    Source:
        megatron/core/utils.py@0.16.1:get_batch_on_this_cp_rank (views a sequence as 2 * cp chunks and selects two);
        megatron/core/models/common/embeddings/language_model_embedding.py@0.16.1: [b, s] becomes [s, b].
    """
    sequences = [
        [(sample, pos) for pos in range(padded_length)] for sample, padded_length in enumerate(packing.padded_lengths)
    ]
    if packing.cp_cut == "contiguous":
        if packing.qkv_format == "thd":
            sequences = [[token for sequence in sequences for token in sequence]]
        sequences = [_one_part(sequence, cp, cp_rank) for sequence in sequences]
    elif cp > 1:
        sequences = [_two_chunks(sequence, cp, cp_rank) for sequence in sequences]
    if packing.qkv_format == "thd":
        return [[token] for sequence in sequences for token in sequence]
    return [[sequence[row] for sequence in sequences] for row in range(len(sequences[0]))]


def tokens_of_rank(packing: Packing, layout: ParallelLayout, rank: int) -> list[Token]:
    """Return [T] the tokens of a rank's MoE layers: sequence parallelism gives each rank as many sequence rows."""
    coords = layout.coords(rank)
    rows = tokens_of_cp_rank(packing, layout.cp, coords.cp_rank)
    if len(rows) % layout.tp:
        raise LayoutError(f"{len(rows)} sequence rows cannot be split over {layout.tp} ranks")
    share = len(rows) // layout.tp
    return [token for row in rows[coords.tp_rank * share : (coords.tp_rank + 1) * share] for token in row]


def repack(
    traces: Sequence[RoutingTrace],
    packing: Packing,
    layout: ParallelLayout,
    rank: int,
    *,
    layer_ids: Sequence[int],
    input_ids: npt.NDArray[np.integer] | None = None,
    dtype: npt.DTypeLike = np.int16,
    last_row: LastRow = "live",
    slot_of: npt.NDArray[np.int32] | None = None,
) -> RankRoutes:
    """Return what `r3_adapter.repack.repack` returns, with one segment a row."""
    tokens = tokens_of_rank(packing, layout, rank)
    if input_ids is not None:
        _check_tokens(traces, packing, layout, rank, input_ids)
    num_experts, topk = traces[0].num_experts, traces[0].topk
    table = list(dict.fromkeys(version for trace in traces for version in trace.weight_versions))
    topk_ids = np.zeros((len(layer_ids), len(tokens), topk), dtype=dtype)
    row_versions = np.zeros(len(tokens), dtype=np.int32)
    num_padding = 0
    for row, (sample, pos) in enumerate(tokens):
        trace = traces[sample]
        balanced = last_row == "balanced" and pos == trace.num_tokens - 1 and not trace.captured[pos]
        if pos >= trace.num_tokens or balanced:
            row_versions[row] = PADDING
            ids = {layer: padding_row(num_padding, num_experts, topk, layout.ep) for layer in layer_ids}
            num_padding += 1
        elif not trace.captured[pos]:
            row_versions[row] = LIVE
            topk_ids[:, row] = np.array(-1).astype(dtype)
            continue
        else:
            row_versions[row] = table.index(trace.weight_versions[trace.version_ids[pos]])
            every = dict(zip(trace.layer_ids.tolist(), trace.topk_ids[pos].tolist(), strict=True))
            ids = {layer: every[layer] for layer in layer_ids}
            if slot_of is not None:
                slots = dict(zip(layer_ids, slot_of.tolist(), strict=True))
                ids = {layer: [slots[layer][expert] for expert in row] for layer, row in ids.items()}
        for m, layer in enumerate(layer_ids):
            topk_ids[m, row] = ids[layer]
    segments = np.array([(sample, pos, 1, row, 1) for row, (sample, pos) in enumerate(tokens)], dtype=np.int64)
    layers = np.array(layer_ids, dtype=np.int32)
    return RankRoutes(
        topk_ids, row_versions, tuple(table), layers, segments.reshape(-1, 5), num_experts, traces[0].model, slot_of
    )


def count_experts(routes: RankRoutes) -> npt.NDArray[np.int64]:
    """Return [M_local, E] how many replayed and padding rows each expert has."""
    counts = np.zeros((len(routes.layer_ids), routes.num_experts), dtype=np.int64)
    for m, layer in enumerate(routes.topk_ids.tolist()):
        for version, row in zip(routes.row_versions.tolist(), layer, strict=True):
            for expert in row if version != LIVE else ():
                counts[m, expert] += 1
    return counts


def padding_row(number: int, num_experts: int, topk: int, ep: int) -> list[int]:
    """Return the experts of a rank's n-th padding row: its expert parallel ranks take turns to give their next one."""
    turns = []
    for i in range(number * topk, (number + 1) * topk):
        ep_rank, turn = i % ep, i // ep
        experts_of_rank = num_experts // ep
        turns.append(ep_rank * experts_of_rank + turn % experts_of_rank)
    return turns


def collect(
    shards: Sequence[RankRoutes],
    token_ids: Sequence[npt.NDArray[np.int32]],
    *,
    layer_ids: Sequence[int],
    num_experts: int,
) -> list[RoutingTrace]:
    """Return what `r3_adapter.repack.collect` returns."""
    if not shards:
        raise LayoutError("no shards")
    routes: dict[tuple[int, int, int], list[int]] = {}
    versions: dict[Token, str | None] = {}
    for shard in shards:
        for (sample, pos), row in _rows_of_shard(shard).items():
            number = int(shard.row_versions[row])
            if (number == PADDING) != (pos >= len(token_ids[sample])):
                raise TraceError(f"sample {sample}, token {pos}: row {row} has version {number}")
            if number == PADDING:
                continue
            version = None if number == LIVE else shard.weight_versions[number]
            if versions.setdefault((sample, pos), version) != version:
                raise TraceError(f"sample {sample}, token {pos}: {version} != {versions[sample, pos]}")
            for m, layer in enumerate(shard.layer_ids.tolist()):
                if (sample, pos, layer) in routes:
                    raise TraceError(f"sample {sample}, token {pos}, layer {layer} is there twice")
                ids = shard.topk_ids[m, row].tolist()
                if shard.slot_of is not None:
                    experts = {slot: expert for expert, slot in enumerate(shard.slot_of[m].tolist())}
                    ids = [experts.get(slot, slot) for slot in ids]
                routes[sample, pos, layer] = ids
    traces = []
    for sample, tokens in enumerate(token_ids):
        topk_ids = np.zeros((len(tokens), len(layer_ids), shards[0].topk_ids.shape[2]), dtype=ids_dtype(num_experts))
        version_ids, names = _fill(topk_ids, sample, layer_ids, num_experts, routes, versions)
        layers = np.array(layer_ids, dtype=np.int32)
        traces.append(RoutingTrace(topk_ids, tokens, version_ids, layers, num_experts, names, shards[0].model))
    return traces


def _fill(
    topk_ids: npt.NDArray[Any],
    sample: int,
    layer_ids: Sequence[int],
    num_experts: int,
    routes: dict[tuple[int, int, int], list[int]],
    versions: dict[Token, str | None],
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Write the ids of a sample; return its version_ids and weight_versions."""
    version_ids = np.full(len(topk_ids), -1, dtype=np.int32)
    names: list[str] = []
    for pos in range(len(topk_ids)):
        for m, layer in enumerate(layer_ids):
            if (sample, pos, layer) not in routes:
                raise TraceError(f"sample {sample}, token {pos}, layer {layer} is missing")
            ids, version = routes[sample, pos, layer], versions[sample, pos]
            if version is None:
                continue
            if not all(0 <= expert < num_experts for expert in ids):
                raise TraceError(f"sample {sample}, token {pos}, layer {layer}: {ids} outside 0 to {num_experts - 1}")
            if version not in names:
                names.append(version)
            version_ids[pos] = names.index(version)
            topk_ids[pos, m] = ids
    return version_ids, tuple(names)


def _one_part(sequence: list[Token], cp: int, cp_rank: int) -> list[Token]:
    if len(sequence) % cp:
        raise LayoutError(f"a sequence of {len(sequence)} tokens cannot be split into {cp} parts")
    parts = iter(sequence)
    return [[next(parts) for _ in range(len(sequence) // cp)] for _ in range(cp)][cp_rank]


def _two_chunks(sequence: list[Token], cp: int, cp_rank: int) -> list[Token]:
    if len(sequence) % (2 * cp):
        raise LayoutError(f"a sequence of {len(sequence)} tokens cannot be split into {2 * cp} chunks")
    size = len(sequence) // (2 * cp)
    chunks = [sequence[i * size : (i + 1) * size] for i in range(2 * cp)]
    return chunks[cp_rank] + chunks[-1 - cp_rank]


def _check_tokens(
    traces: Sequence[RoutingTrace],
    packing: Packing,
    layout: ParallelLayout,
    rank: int,
    input_ids: npt.NDArray[np.integer],
) -> None:
    """Compare the whole context parallel rank's tokens that this rank has."""
    rows = tokens_of_cp_rank(packing, layout.cp, layout.coords(rank).cp_rank)
    here = set(tokens_of_rank(packing, layout, rank))
    for s, row in enumerate(rows):
        for i, (sample, pos) in enumerate(row):
            found = input_ids[i, s] if packing.qkv_format == "sbhd" else input_ids[s]
            trace = traces[sample]
            if (sample, pos) in here and pos < trace.num_tokens and trace.token_ids[pos] != found:
                raise TraceError(f"sample {sample}, position {pos}: token {trace.token_ids[pos]} != {found}")


def _rows_of_shard(shard: RankRoutes) -> dict[Token, int]:
    """Return the local row of each token."""
    rows: dict[Token, int] = {}
    for sample, pos, length, row, stride in shard.segments.tolist():
        for i in range(length):
            if (sample, pos + i) in rows:
                raise TraceError(f"sample {sample}, token {pos + i} is there twice")
            rows[sample, pos + i] = row + i * stride
    if sorted(rows.values()) != list(range(len(shard.row_versions))):
        raise TraceError(f"{len(rows)} tokens do not fill {len(shard.row_versions)} local rows once")
    return rows
