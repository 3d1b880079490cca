"""The loops over routes. Arrays are taken as they are: a dtype or layout that does not fit is refused.

S: tokens of a sample; M: MoE layers of a trace; K: experts a token; E: experts; T: local rows; N: segments.
Every array is C-contiguous and aligned. Wrong arrays and values raise ValueError; what is no array, TypeError.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

def find_bad_route(
    topk_ids: npt.NDArray[Any], version_ids: npt.NDArray[np.int32], num_experts: int
) -> tuple[int, int] | None:
    """Return (token, layer) of the first wrong route, or None.

    topk_ids: [S, M, K] uint8 or uint16.
    version_ids: [S] int32; a token with a version >= 0 needs K distinct ids below num_experts in each layer, any
        other only 0.
    """

def repack(
    *,
    topk_ids: list[npt.NDArray[Any]],
    version_ids: list[npt.NDArray[np.int32]],
    segments: npt.NDArray[np.int64],
    layer_indices: npt.NDArray[np.int64],
    out: npt.NDArray[Any],
    row_versions: npt.NDArray[np.int32],
    num_experts: int,
    ep_size: int,
    counts: npt.NDArray[np.int64] | None = None,
    token_ids: list[npt.NDArray[np.int32]] | None = None,
    expected_ids: npt.NDArray[np.int64] | None = None,
    version_maps: list[npt.NDArray[np.int32] | None] | None = None,
    num_threads: int = 1,
    stream_from: int = 1 << 22,
    balance_last: bool = False,
    slot_of: npt.NDArray[np.int32] | None = None,
) -> None:
    """Write what a rank's MoE layers need of the traces of a micro-batch.

    topk_ids: [S, M, K] uint8 or uint16 of each sample.
    version_ids: [S] int32 of each sample; below 0 where the row was not captured.
    segments: [N, 5] int64; sample, pos, length, row, stride; positions from S on are padding.
    layer_indices: [M_local] int64; index into M of each local layer.
    out: [M_local, T, K] uint8, uint16, int16, int32 or int64, written; all bits set in live rows.
    row_versions: [T] int32, written; the version, or -1 live, -2 padding.
    ep_size: divides num_experts; padding is spread evenly over the ep_size ranks and their experts.
    counts: [M_local, E] int64, written; ids of each expert in replayed and padding rows.
    token_ids: [S] int32 of each sample; compared with
    expected_ids: [T] int64; the micro-batch's tokens at the local rows; not looked at in padding rows.
    version_maps: [V] int32 of each sample, or None: what row_versions calls each of the sample's versions instead.
    stream_from: bytes of `out` from which on it is written past the cache; changes the time only.
    balance_last: write a sample's last token, if it was not captured, as padding.
    slot_of: [M_local, E] int32; what to write in the place of each expert, a permutation for each layer; padding is not
        looked up.
    """

def count_experts(
    *, topk_ids: npt.NDArray[Any], row_versions: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]
) -> None:
    """Count the rows of each expert; live rows are left out.

    topk_ids: [M_local, T, K] uint8, uint16, int16, int32 or int64.
    row_versions: [T] int32; the version, or -1 live, -2 padding.
    counts: [M_local, E] int64, written.
    """

def collect(
    *,
    ids: list[npt.NDArray[Any]],
    row_versions: list[npt.NDArray[np.int32]],
    segments: list[npt.NDArray[np.int64]],
    layer_indices: list[npt.NDArray[np.int64]],
    topk_ids: list[npt.NDArray[Any]],
    version_ids: list[npt.NDArray[np.int32]],
    layer_ids: npt.NDArray[np.int32],
    num_experts: int,
    num_threads: int = 1,
) -> None:
    """Write the traces that the shards hold together; the inverse of repack.

    ids: [M_shard, T, K] uint8, uint16, int16, int32 or int64 of each shard; not looked at in live and padding rows.
    row_versions: [T] int32 of each shard; the version, or -1 live, -2 padding.
    segments: [N, 5] int64 of each shard, as in repack.
    layer_indices: [M_shard] int64 of each shard; index into M.
    topk_ids: [S, M, K] uint8 or uint16 of each sample, written; 0 in rows that were live.
    version_ids: [S] int32 of each sample, written; -1 in rows that were live.
    layer_ids: [M] int32; names a layer in an error.
    """

def set_bits(num_experts: int, topk: int) -> int:
    """Return the bits of a route's code: the least that tell all sets of K of E experts apart; K <= 16, E <= 1024."""

def encode_sets(
    *,
    topk_ids: npt.NDArray[Any],
    version_ids: npt.NDArray[np.int32],
    num_experts: int,
    codes: npt.NDArray[np.uint8],
) -> None:
    """Write the code of each captured route, bit after bit.

    topk_ids: [S, M, K] uint8 or uint16; distinct ids below num_experts in each captured route, 0 in others.
    version_ids: [S] int32; below 0 where the row was not captured.
    codes: [(captured * M * set_bits + 7) // 8] uint8, written.
    """

def decode_sets(
    *,
    codes: npt.NDArray[np.uint8],
    version_ids: npt.NDArray[np.int32],
    num_experts: int,
    topk_ids: npt.NDArray[Any],
) -> None:
    """Write the rows of codes: the inverse of encode_sets, but each row's ids are sorted.

    codes: uint8, of exactly the length that encode_sets writes; no code too large, no bit set behind the last one.
    topk_ids: [S, M, K] uint8 or uint16, written; 0 where the row was not captured.
    """

def place(
    *,
    loads: npt.NDArray[np.int32],
    expert_at: npt.NDArray[np.int32],
    num_ranks: int,
    num_groups: int,
    seed: int,
    num_swaps: int,
    num_threads: int = 1,
) -> None:
    """Write which expert lies at each slot of each layer, so that ranks get as many tokens as each other.

    loads: [B, L, E] int32; tokens of each micro-step at each expert.
    expert_at: [L, E] int32, written; slots of a rank lie next to each other.
    num_ranks: divides E. num_groups: divides E; experts of a group stay in one block of E / num_groups slots.
    num_swaps: tried in each layer.
    """

def compose(
    *,
    counts: npt.NDArray[np.int32],
    expert_at: npt.NDArray[np.int32],
    tokens: npt.NDArray[np.int64],
    step_of: npt.NDArray[np.int32],
    part_of: npt.NDArray[np.int32],
    num_ranks: int,
    num_steps: int,
    num_groups: int,
    num_parts: int,
    max_tokens: int,
    attention: float,
    seed: int,
    num_moves: int,
    num_threads: int = 1,
) -> int:
    """Write in which part of which micro-step each sample goes; return how many micro-steps there are.

    counts: [S, L, E] int32; tokens of a sample at each expert. expert_at: [L, E] int32; the expert of each slot.
    tokens: [S] int64. step_of, part_of: [S] int32, written.
    num_steps: at least; there are more, by num_groups each time, if samples do not fit into as many.
    max_tokens: of a part; a longer sample has one for itself.
    attention: weight of the squares of lengths.
    num_moves: tried, about.
    """
