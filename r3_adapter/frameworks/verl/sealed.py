"""Rows of routes that carry the token they were computed for, in the one form that verl's batches take.

verl passes routes on as an int16 array [rows, layers, topk] without any metadata. It pads the array with zeros, cuts
it, and joins rows of several replies by position. So each row gets a few more "layers" at its end, which hold its token
id and the step of its weights. Whatever verl does with the rows, the trainer can tell which token each belongs to.

S: tokens of a sample; R: rows of a reply; L: decoder layers; K: experts a token; P: layers that hold a row's token and
step, `num_seal_layers`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import CaptureError, TraceError
from r3_adapter.frozen import freeze
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace, ids_dtype

_MARK = 0x5233
_WORDS = 5
"""Of 16 bits: the mark of a row that has a route, its token id (2), and the step of its weights (2)."""
_NO_STEP = (1 << 32) - 1
UNKNOWN_STEP = "unknown"
"""The weights' name in rows of an engine that was not told its step."""


def num_seal_layers(topk: int) -> int:
    """Return P."""
    return -(-_WORDS // topk)


def seal(
    rows: npt.NDArray[Any], token_ids: Sequence[int], step: int | None, moe: MoEConfig, place: str
) -> npt.NDArray[np.int16]:
    """Return [R, L + P, K] int16, rows that say which token they are of.

    rows: [R, L, K], of any integer type; dense layers 0.
    token_ids: [R]; the tokens that were fed to the engine at these rows.
    step: of the weights that computed them; None where it is not known.

    Raises:
        CaptureError: rows of another model, ids out of range, or as many tokens as there are not rows.
    """
    want = (len(token_ids), moe.num_layers, moe.topk)
    if rows.dtype.kind not in "iu" or rows.shape != want:
        raise CaptureError(
            f"{place}: routes of {rows.dtype}, shape {list(rows.shape)} != whole numbers of {list(want)} "
            "(tokens - 1, decoder layers, topk)"
        )
    if moe.num_experts > 1 << 15:
        raise CaptureError(f"{place}: num_experts ({moe.num_experts}) > {1 << 15}: verl's batches hold int16")
    if wrong := _wrong_id(rows, moe):
        raise CaptureError(f"{place}: {wrong}")
    sealed = np.zeros((want[0], want[1] + num_seal_layers(moe.topk), moe.topk), np.int16)
    sealed[:, : moe.num_layers] = rows
    words = np.empty((want[0], _WORDS), np.uint16)
    tokens, number = np.asarray(token_ids, np.uint32), _NO_STEP if step is None else step
    words[:, 0] = _MARK
    words[:, 1], words[:, 2] = tokens & 0xFFFF, tokens >> 16
    words[:, 3], words[:, 4] = number & 0xFFFF, number >> 16
    sealed.reshape(want[0], -1)[:, want[1] * want[2] :][:, :_WORDS] = words.view(np.int16)
    return sealed


def unseal(sealed: npt.NDArray[Any], token_ids: npt.NDArray[Any], moe: MoEConfig, place: str) -> RoutingTrace:
    """Return the trace of a sample, its rows compared with its tokens one by one.

    sealed: [S, L + P, K] int16; zeros behind the last row, for tokens that were never fed to the engine.
    token_ids: [S], of any integer type.

    Raises:
        TraceError: rows of another model or of other tokens, rows that are not sealed, or a gap between them; names
            `place`, the position, and both operands.
    """
    want = (len(token_ids), moe.num_layers + num_seal_layers(moe.topk), moe.topk)
    if sealed.dtype != np.int16 or sealed.shape != want:
        raise TraceError(
            f"{place}: routed_experts of {sealed.dtype}, shape {list(sealed.shape)} != int16 of {list(want)} (tokens, "
            f"{moe.num_layers} decoder layers and {want[1] - moe.num_layers} of the plug-in, topk): was it loaded "
            "in the processes of the rollout too?"
        )
    flat = np.ascontiguousarray(sealed).reshape(want[0], -1)
    words = flat[:, moe.num_layers * moe.topk :][:, :_WORDS].view(np.uint16).astype(np.uint32)
    captured = words[:, 0] == _MARK
    number = _num_rows(captured, flat, place)
    tokens = words[:number, 1] | words[:number, 2] << 16
    fed = np.asarray(token_ids)
    if len(other := np.flatnonzero(tokens != fed[:number])):
        at = int(other[0])
        raise TraceError(f"{place}: the row at position {at} is of token {tokens[at]} != {fed[at]} of the batch")
    rows = sealed[:, : moe.num_layers]
    if wrong := _wrong_id(rows, moe):
        raise TraceError(f"{place}: {wrong}")
    steps, version_ids = np.unique(words[:number, 3] | words[:number, 4] << 16, return_inverse=True)
    rest = np.full(want[0] - number, NOT_CAPTURED)
    try:
        return RoutingTrace(
            topk_ids=freeze(np.ascontiguousarray(rows[:, list(moe.layer_ids)], ids_dtype(moe.num_experts))),
            token_ids=freeze(fed.astype(np.int32)),
            version_ids=freeze(np.concatenate([version_ids, rest]).astype(np.int32)),
            layer_ids=np.asarray(moe.layer_ids, np.int32),
            num_experts=moe.num_experts,
            weight_versions=tuple(UNKNOWN_STEP if step == _NO_STEP else str(step) for step in steps.tolist()),
        )
    except TraceError as error:
        raise TraceError(f"{place}: {error}") from error


def _num_rows(captured: npt.NDArray[np.bool_], flat: npt.NDArray[np.int16], place: str) -> int:
    """Return the number of rows; refuse an empty row between others, and an array that is not sealed."""
    number = int(captured.sum())
    if not captured[:number].all():
        at = int(np.flatnonzero(~captured)[0])
        raise TraceError(f"{place}: no row at position {at}, and there are {number} rows, some behind it")
    if len(other := np.flatnonzero(flat[number:].any(axis=1))):
        raise TraceError(
            f"{place}: the row at position {number + int(other[0])} does not say which token it is of: it was not made "
            "by this plug-in, or was changed on its way"
        )
    return number


def _wrong_id(rows: npt.NDArray[Any], moe: MoEConfig) -> str:
    """Say which of [R, L, K] ids is wrong: no expert, or one in a dense layer; an empty string if none is."""
    if rows.size and (rows.min() < 0 or rows.max() >= moe.num_experts):
        row, layer, column = np.argwhere((rows < 0) | (rows >= moe.num_experts))[0]
        found = rows[row, layer, column]
        return f"expert {found} at token {row}, layer {layer} outside 0 to num_experts ({moe.num_experts}) - 1"
    for layer in sorted(set(range(moe.num_layers)) - set(moe.layer_ids)):
        if rows[:, layer].any():
            return f"layer {layer} has routes, but the MoE layers are {list(moe.layer_ids)}"
    return ""
