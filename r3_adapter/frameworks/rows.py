"""Routes in a framework's data: the engine's rows become traces, and traces become arrays of int32.

S: tokens of a sample; L: decoder layers; K: experts a token.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import CaptureError, ReplayError, TraceError, check_whole, show
from r3_adapter.sglang.capture import trace_of_rows
from r3_adapter.sglang.computation import read_computations
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import RoutingTrace

UNKNOWN_VERSION = "unknown"
"""The name of weights that a sample does not name."""


def moe_of_arguments(arguments: Any) -> MoEConfig:
    """Return what Megatron's arguments say of the model's routers.

    arguments: with num_layers, num_experts, moe_router_topk, and moe_layer_freq, a number or [L] of 0 and 1.

    Raises:
        ReplayError: One is missing or makes no sense, or the model is dense.

    Source: megatron/core/models/gpt/gpt_layer_specs.py@0.16.1:get_gpt_decoder_layer_specs
    """
    values = {
        name: check_whole(name, getattr(arguments, name, None), 1, error=ReplayError)
        for name in ("num_layers", "num_experts", "moe_router_topk")
    }
    num_layers, frequency = values["num_layers"], getattr(arguments, "moe_layer_freq", 1)
    if isinstance(frequency, list | tuple):
        if len(frequency) != num_layers or not set(frequency) <= {0, 1}:
            raise ReplayError(f"moe_layer_freq {show(frequency)} is not {num_layers} (num_layers) times 0 or 1")
        pattern = list(frequency)
    else:
        every = check_whole("moe_layer_freq", frequency, 1, error=ReplayError)
        pattern = [int(layer % every == 0) for layer in range(num_layers)]
    layer_ids = tuple(layer for layer, is_moe in enumerate(pattern) if is_moe)
    if not layer_ids:
        raise ReplayError(f"moe_layer_freq {show(frequency)}: none of {num_layers} layers has experts")
    return MoEConfig(values["num_experts"], values["moe_router_topk"], layer_ids, num_layers)


def trace_of_sample(
    routes: Any,
    *,
    token_ids: list[int],
    num_prompt_tokens: int,
    moe: MoEConfig,
    weight_version: str,
    place: str,
) -> RoutingTrace:
    """Return the trace of a sample, bound to its tokens.

    routes: [S - 1, L, K], of any integer type, as upstream's reply has them, dense layers 0; or the engine's
        safetensors; or a trace.

    Raises:
        CaptureError, TraceError: Routes of other tokens or of another model; names `place` and both operands.
    """
    if isinstance(routes, bytes | memoryview):
        found = read_computations(routes, place=place)
        if len(found) != 1:
            raise CaptureError(f"{place}: computed {len(found)} times != 1, since it was retracted")
        if found[0].start:
            raise CaptureError(f"{place}: routes from token {found[0].start} != 0 on")
        routes = found[0].trace
    if isinstance(routes, RoutingTrace):
        return _checked(routes, token_ids, moe, place)
    rows = np.asarray(routes)
    shape = (len(token_ids) - 1, moe.num_layers, moe.topk)
    if rows.dtype.kind not in "iu" or rows.shape != shape:
        raise CaptureError(
            f"{place}: routes of {rows.dtype}, shape {list(rows.shape)} != whole numbers of {list(shape)}"
            " (tokens - 1, decoder layers, topk)"
        )
    return trace_of_rows(
        rows,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        moe=moe,
        weight_versions=weight_version,
        place=place,
    )


def _checked(trace: RoutingTrace, token_ids: list[int], moe: MoEConfig, place: str) -> RoutingTrace:
    for name, have, want in (
        ("num_experts", trace.num_experts, moe.num_experts),
        ("topk", trace.topk, moe.topk),
        ("layer_ids", trace.layer_ids.tolist(), list(moe.layer_ids)),
        ("number of tokens", trace.num_tokens, len(token_ids)),
    ):
        if have != want:
            raise CaptureError(f"{place}: routes of {name} {have} != {want}")
    other = np.flatnonzero(trace.token_ids != np.asarray(token_ids))
    if len(other):
        at = int(other[0])
        raise CaptureError(f"{place}: routes of token id {trace.token_ids[at]} != {token_ids[at]} at token {at}")
    return trace


def to_int32(trace: RoutingTrace) -> npt.NDArray[np.int32]:
    """Return a trace as a writable array of int32, which a framework's data may carry: its length, then its bytes."""
    data = trace.to_bytes()
    found = np.zeros(1 + (len(data) + 3) // 4, np.int32)
    found[0] = len(data)
    found[1:].view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    return found


def from_int32(array: Any, *, place: str) -> RoutingTrace:
    """Return the trace of an array that `to_int32` made; its digest is checked.

    Raises:
        TraceError: It is none; names `place`.
    """
    found = np.ascontiguousarray(np.asarray(array))
    if found.dtype != np.int32 or found.ndim != 1 or found.size < 2:
        raise TraceError(f"{place}: {found.dtype} of shape {list(found.shape)} is no trace in int32")
    size = int(found[0])
    if not 0 < size <= 4 * (found.size - 1):
        raise TraceError(f"{place}: a trace of {size} bytes != up to {4 * (found.size - 1)} of its array")
    return RoutingTrace.from_bytes(found[1:].view(np.uint8)[:size].tobytes(), place=place)
