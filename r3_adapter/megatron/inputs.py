"""Checks of the arguments of replay that name what is wrong: types, shapes, and tokens that are cut in another way.

b: samples; s: sequence length; t: tokens of a packed micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import RankRoutes
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
    shape, samples, padded_length = tuple(tokens.shape), packing.num_samples, packing.padded_lengths[0]
    full = (samples, padded_length) if packing.qkv_format == "sbhd" else (1, packing.num_tokens)
    want = (full[0], full[1] // cp)
    if shape == want:
        return
    names = f"tokens {shape} != {want}, a cp rank's share of {samples} samples"
    if shape == full:
        raise LayoutError(f"{names}: these tokens are not cut for context parallelism, of which there are {cp} ranks")
    if shape == want[::-1]:
        raise LayoutError(f"{names}: these tokens are [s, b]; replay takes input_ids, [b, s]")
    if packing.qkv_format == "sbhd" and shape == (1, samples * want[1]):
        raise LayoutError(
            f"{names}: these tokens are sample by sample, b * s + i; the rows of a padded batch are s * b + i in "
            "Megatron: give input_ids as the model gets it, or Packing.packed if it gets a packed batch"
        )
    if packing.qkv_format == "thd" and tokens.numel() == want[1]:
        raise LayoutError(
            f"{names}: these tokens are a padded batch of {shape[0]} samples, and its rows are s * b + i in Megatron, "
            "not sample by sample: give Packing.padded"
        )
    raise LayoutError(names)


def check_order(place: str, input_ids: object, routes: RankRoutes) -> None:
    """Refuse a forward pass whose rows are in another order than its routes: the numbers of rows may be the same.

    input_ids: the first argument of GPTModel.forward, [b, s]; where there is another or none, nothing is known. verl
        gives stages behind the first, which read none, its nested tensor of samples.

    Raises:
        ReplayError: Names both orders.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_nested:
        return
    if len(input_ids) == routes.num_interleaved:
        return
    b, want = len(input_ids), routes.num_interleaved
    made = (
        f"a padded batch of {want} samples, s * {want} + i" if want > 1 else "a packed batch [1, t], sample by sample"
    )
    raise ReplayError(
        f"{place}: its input_ids are {tuple(input_ids.shape)}, so that Megatron's rows are s * {b} + i, and its routes "
        f"are in the order of {made}: prepare them with the packing of what the model gets"
    )


def name_cut(
    traces: Sequence[RoutingTrace], tokens: npt.NDArray[Any], packing: Packing, layout: ParallelLayout, cp_rank: int
) -> str:
    """Name the order of tokens that do not lie as the packing says, if it is a known one; else an empty string.

    tokens: [b, s / cp] or [1, t / cp].
    """
    cp, rows = layout.cp, [np.full(padded_length, _NO_TOKEN, np.int64) for padded_length in packing.padded_lengths]
    if len(traces) != len(rows) or any(len(row) < trace.num_tokens for row, trace in zip(rows, traces, strict=True)):
        return ""
    for row, trace in zip(rows, traces, strict=True):
        row[: trace.num_tokens] = trace.token_ids
    own = own_cut(rows, packing, cp)
    if _same(tokens, mine := own(cp_rank)):
        return ""
    if _same(tokens, mine.T.reshape(mine.shape)):
        return "these tokens lie in the order of Megatron's rows, s * b + i; replay takes input_ids, [b, s]"
    for found, says in _other_cuts(rows, packing, cp, cp_rank) if cp > 1 else ():
        if _same(tokens, found):
            return f"these tokens are cut {says}; {_expected(packing, cp, cp_rank)}"
    for other in range(cp):
        if _same(tokens, own(other)):
            return f"these tokens are cut for cp rank {other}; {_expected(packing, cp, cp_rank)}"
    return ""


def _same(tokens: npt.NDArray[Any], found: npt.NDArray[np.int64]) -> bool:
    """Tell whether tokens equal those found, outside of padding; there must be at least one."""
    real = found != _NO_TOKEN
    return found.shape == tokens.shape and bool(real.any()) and np.array_equal(found[real], tokens[real])


def _expected(packing: Packing, cp: int, cp_rank: int) -> str:
    if packing.cp_cut == "zigzag":
        return (
            f"replay expects Megatron's zigzag cut, where cp rank {cp_rank} of {cp} has chunks {cp_rank} and "
            f"{2 * cp - 1 - cp_rank} of {2 * cp} of each sample"
        )
    whole = "each sample" if packing.qkv_format == "sbhd" else "the packed stream as a whole"
    return f"replay expects the packing's contiguous cut, where cp rank {cp_rank} of {cp} has part {cp_rank} of {whole}"


def _joined(parts: Sequence[npt.NDArray[np.int64]], packing: Packing) -> npt.NDArray[np.int64]:
    return np.stack(parts) if packing.qkv_format == "sbhd" else np.concatenate(parts)[None]


def _stream(rows: list[npt.NDArray[np.int64]], packing: Packing) -> list[npt.NDArray[np.int64]]:
    return rows if packing.qkv_format == "sbhd" else [np.concatenate(rows)]


def _zigzag(rows: list[npt.NDArray[np.int64]], packing: Packing, cp: int, rank: int) -> npt.NDArray[np.int64]:
    halves = [np.array_split(row, 2 * cp) for row in rows]
    return _joined([np.concatenate([half[rank], half[2 * cp - 1 - rank]]) for half in halves], packing)


def _interval(rows: list[npt.NDArray[np.int64]], packing: Packing, cp: int, rank: int) -> npt.NDArray[np.int64]:
    return _joined([np.array_split(row, cp)[rank] for row in rows], packing)


def own_cut(rows: list[npt.NDArray[np.int64]], packing: Packing, cp: int) -> Callable[[int], npt.NDArray[np.int64]]:
    """Return a function from a cp rank to its tokens, [b, s / cp] or [1, t / cp], cut as the packing says.

    rows: the tokens of each sample, or any number for each of them.

    Source: megatron/core/utils.py@0.16.1:get_batch_on_this_cp_rank
    """
    if cp == 1:
        return lambda rank: _joined(rows, packing)
    if packing.cp_cut == "zigzag":
        return lambda rank: _zigzag(rows, packing, cp, rank)
    return lambda rank: _interval(_stream(rows, packing), packing, cp, rank)


def _other_cuts(
    rows: list[npt.NDArray[np.int64]], packing: Packing, cp: int, cp_rank: int
) -> Iterator[tuple[npt.NDArray[np.int64], str]]:
    """Yield a rank's tokens as other cuts than the packing's make them, with the cut's name."""
    zigzag = packing.cp_cut == "zigzag"
    if not zigzag:
        yield _zigzag(rows, packing, cp, cp_rank), "in Megatron's zigzag, two chunks of each sample"
    yield _interval(rows, packing, cp, cp_rank), "contiguously" if zigzag else "contiguously, sample by sample"
    if packing.qkv_format == "thd":
        whole = _interval(_stream(rows, packing), packing, cp, cp_rank)
        yield whole, "contiguously, the packed stream as a whole"
    yield _joined([row[cp_rank::cp] for row in rows], packing), "token by token in turns"
    yield _joined([row[: len(row) // cp] for row in rows], packing), "for no rank, or for cp rank 0"


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
