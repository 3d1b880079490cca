"""What is wrong with the arguments of replay, said by name: their types and shapes, and tokens that are cut otherwise.

b: samples; s: sequence length; t: tokens of a packed micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.trace import RoutingTrace

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NO_TOKEN = -1


def check_inputs(traces: object, tokens: object, packing: object, weight_version: object) -> None:
    """Refuse arguments of `prepare` of another type or rank.

    Raises:
        ReplayError, LayoutError: Names the argument, what it is, and what it should be.
    """
    if isinstance(traces, RoutingTrace | str | bytes) or not isinstance(traces, Sequence):
        raise ReplayError(f"traces: {_a(traces)} is not a sequence of RoutingTrace")
    for sample, trace in enumerate(traces):
        if not isinstance(trace, RoutingTrace):
            raise ReplayError(f"sample {sample}: {_a(trace)} is not a RoutingTrace")
    if not isinstance(tokens, torch.Tensor):
        raise ReplayError(f"tokens: {_a(tokens)} is not a tensor of [b, s]")
    if tokens.ndim != 2:
        raise LayoutError(
            f"tokens of shape {tuple(tokens.shape)} have {tokens.ndim} dimensions != 2 of [b, s] or [1, t]"
        )
    if tokens.dtype not in _WHOLE:
        raise ReplayError(f"tokens of {tokens.dtype} != torch.int64: they are no ids")
    if not tokens.numel() or not traces:
        raise LayoutError(f"an empty micro-batch: {len(traces)} traces, tokens of shape {tuple(tokens.shape)}")
    if packing is not None and not isinstance(packing, Packing):
        raise ReplayError(f"packing: {_a(packing)} is not a Packing; see Packing.padded and Packing.packed")
    if weight_version is not None and not isinstance(weight_version, str):
        raise ReplayError(f"weight_version: {weight_version!r} is not a string, as the engine's names are")


def check_device(tokens: torch.Tensor, weight: object) -> None:
    """Refuse tokens that are not where the model is; weights on the host may be on their way to a GPU.

    Raises:
        ReplayError: Names both devices.
    """
    device = weight.device if isinstance(weight, torch.Tensor) else torch.device("cpu")
    if tokens.device.type == "meta" or (device.type not in ("cpu", "meta") and tokens.device != device):
        raise ReplayError(f"tokens on {tokens.device} != {device}, the model's device")


def check_shape(tokens: torch.Tensor, packing: Packing, cp: int) -> None:
    """Refuse tokens whose shape is not that of a rank's share of the packing; name a usual mistake.

    Raises:
        LayoutError: Names both shapes.
    """
    shape, samples, room = tuple(tokens.shape), packing.num_samples, packing.rooms[0]
    full = (samples, room) if packing.qkv_format == "sbhd" else (1, packing.num_tokens)
    want = (full[0], full[1] // cp)
    if shape == want:
        return
    names = f"tokens {shape} != {want}, a cp rank's share of {samples} samples"
    if shape == full:
        raise LayoutError(f"{names}: these tokens are not cut for context parallelism, of which there are {cp} ranks")
    if shape == want[::-1]:
        raise LayoutError(f"{names}: these tokens are [s, b]; replay takes input_ids, [b, s]")
    raise LayoutError(names)


def name_cut(
    traces: Sequence[RoutingTrace], tokens: npt.NDArray[Any], packing: Packing, layout: ParallelLayout, cp_rank: int
) -> str:
    """Say how tokens that are not cut as the packing says are cut, if it is a way that is known; else an empty string.

    tokens: [b, s / cp] or [1, t / cp].
    """
    cp = layout.cp
    if cp == 1:
        return ""
    rows = [np.full(room, _NO_TOKEN, np.int64) for room in packing.rooms]
    for row, trace in zip(rows, traces, strict=True):
        row[: trace.num_tokens] = trace.token_ids
    for found, says in _cuts(rows, packing, cp, cp_rank):
        real = found != _NO_TOKEN
        if found.shape == tokens.shape and real.any() and np.array_equal(found[real], tokens[real]):
            return f"these tokens are cut {says}; {_expected(packing, cp, cp_rank)}" if says else ""
    return ""


def _expected(packing: Packing, cp: int, cp_rank: int) -> str:
    if packing.cp_cut == "zigzag":
        return (
            f"replay expects Megatron's zigzag cut, where cp rank {cp_rank} of {cp} has chunks {cp_rank} and "
            f"{2 * cp - 1 - cp_rank} of {2 * cp} of each sample"
        )
    whole = "each sample" if packing.qkv_format == "sbhd" else "the packed stream as a whole"
    return f"replay expects the packing's contiguous cut, where cp rank {cp_rank} of {cp} has part {cp_rank} of {whole}"


def _cuts(
    rows: Sequence[npt.NDArray[np.int64]], packing: Packing, cp: int, cp_rank: int
) -> Iterator[tuple[npt.NDArray[np.int64], str]]:
    """Yield a rank's tokens in the ways of cutting them, with a name; the packing's own comes first and has none."""
    join: Callable[[list[npt.NDArray[np.int64]]], npt.NDArray[np.int64]]
    join = np.stack if packing.qkv_format == "sbhd" else lambda parts: np.concatenate(parts)[None]

    def zigzag(rank: int) -> npt.NDArray[np.int64]:
        halves = [np.array_split(row, 2 * cp) for row in rows]
        return join([np.concatenate([half[rank], half[2 * cp - 1 - rank]]) for half in halves])

    def interval(rank: int, parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        return join([np.array_split(part, cp)[rank] for part in parts])

    stream = rows if packing.qkv_format == "sbhd" else [np.concatenate(rows)]
    own = zigzag if packing.cp_cut == "zigzag" else lambda rank: interval(rank, stream)
    yield own(cp_rank), ""
    if packing.cp_cut == "contiguous":
        yield zigzag(cp_rank), "in Megatron's zigzag, two chunks of each sample"
    yield interval(cp_rank, rows), "contiguously" if packing.cp_cut == "zigzag" else "contiguously, sample by sample"
    if packing.qkv_format == "thd":
        yield interval(cp_rank, stream), "contiguously, the packed stream as a whole"
    yield join([row[cp_rank::cp] for row in rows]), "token by token in turns"
    yield join([row[: len(row) // cp] for row in rows]), "for no rank, or for cp rank 0"
    for other in range(cp):
        yield own(other), f"for cp rank {other}"


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
