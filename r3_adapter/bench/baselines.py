"""What repack is compared with: the same result in numpy, in torch as trainers do it, and plain copies of memory.

S: tokens of a sample; M: MoE layers of a trace; K: experts a token; T: tokens of a rank.
"""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Sequence[npt.NDArray[Any]]


def numpy_direct(topk_ids: Arrays, segments: npt.NDArray[np.int64], layers: list[int], out: npt.NDArray[Any]) -> None:
    """Assign the transposed layers of each segment to where they belong, converting on the way: one write, no copies.

    topk_ids: [S, M, K] of each sample; out: [M_local, T, K], every row of which a segment fills.
    """
    picked = slice(layers[0], layers[-1] + 1) if layers == list(range(layers[0], layers[-1] + 1)) else layers
    for sample, pos, length, row, stride in segments.tolist():
        found = topk_ids[sample][pos : pos + length]
        out[:, row : row + len(found) * stride : stride] = found[:, picked].transpose(1, 0, 2)


def numpy_blocked(topk_ids: Arrays, segments: npt.NDArray[np.int64], layers: list[int], out: npt.NDArray[Any]) -> None:
    """Do the same faster: K = 8 ids of a byte move as one word, in blocks that stay in the cache until they are wider.

    The big output is still written once; what is written twice is a block of 1024 tokens.
    """
    if topk_ids[0].dtype != np.uint8 or topk_ids[0].shape[2] != 8:
        numpy_direct(topk_ids, segments, layers, out)
        return
    picked = slice(layers[0], layers[-1] + 1) if layers == list(range(layers[0], layers[-1] + 1)) else layers
    block = np.empty((len(layers), 1024), dtype=np.uint64)
    for sample, pos, length, row, stride in segments.tolist():
        words = topk_ids[sample].view(np.uint64)[pos : pos + length, picked, 0]
        for begin in range(0, len(words), 1024):
            count = min(1024, len(words) - begin)
            np.copyto(block[:, :count], words[begin : begin + count].T)
            first = row + begin * stride
            wide = out[:, first : first + count * stride : stride]
            wide[:] = block[:, :count].view(np.uint8).reshape(len(layers), count, 8)


def torch_indexing(
    topk_ids: Arrays, padded_lengths: Sequence[int], cp: int, cp_rank: int, tp: int, tp_rank: int, layers: list[int]
) -> list[Any]:
    """Return the ids of each local layer as trainers make them: sample by sample, then joined, cut and indexed.

    Each sample becomes int32, is padded and cut into the zigzag chunks of its context parallel rank; all
    are concatenated, cut for sequence parallelism, and indexed layer by layer.
    """
    import torch

    parts = []
    for ids, padded_length in zip(topk_ids, padded_lengths, strict=True):
        sample = torch.frombuffer(ids.data, dtype=torch.uint8).view(ids.shape).to(torch.int32)
        sample = torch.nn.functional.pad(sample, (0, 0, 0, 0, 0, padded_length - len(sample)))
        if cp > 1:
            chunks = sample.chunk(2 * cp)
            sample = torch.cat([chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]])
        parts.append(sample)
    packed = torch.cat(parts).chunk(tp)[tp_rank]
    return [packed[:, layer].contiguous() for layer in layers]


def copy_memory(source: npt.NDArray[Any], to: npt.NDArray[np.uint8], num_bytes: int, num_threads: int = 1) -> None:
    """Copy bytes with the C library's memmove, over and over from an array until all are copied."""
    shares = []
    for begin, end in pairwise(num_bytes * thread // num_threads for thread in range(num_threads + 1)):
        pieces = []
        while begin < end:
            place = begin % source.nbytes
            size = min(source.nbytes - place, end - begin)
            pieces.append((to.ctypes.data + begin, source.ctypes.data + place, size))
            begin += size  # noqa: PLW2901
        shares.append(pieces)
    if num_threads == 1:
        _move(shares[0])
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(_move, shares))


def _move(pieces: list[tuple[int, int, int]]) -> None:
    for to, source, size in pieces:
        ctypes.memmove(to, source, size)


def copy_share(topk_ids: Arrays, segments: npt.NDArray[np.int64], first: int, last: int, to: Any) -> None:
    """Copy the layers first to last of each token of a rank, token after token: what is read lies at the same places.

    to: [T, (last - first) * K] of the ids' type.
    """
    topk = topk_ids[0].shape[2]
    for sample, pos, length, row, _ in segments.tolist():
        flat = topk_ids[sample].reshape(len(topk_ids[sample]), -1)[pos : pos + length, first * topk : last * topk]
        np.copyto(to[row : row + len(flat)], flat)
