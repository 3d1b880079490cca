"""Make routing traces of what SGLang replies, in either form; refuse what does not belong to the sample.

S: tokens of the sample (prompt and output); L: decoder layers; M: MoE layers; K: experts a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import CaptureError, TraceError, check_choice, check_whole
from r3_adapter.sglang.computation import Computation, read_computations
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.reply import (
    Policy,
    check_finished,
    from_base64,
    info_of,
    output_ids_of,
    payload_of,
    version_rows,
    was_aborted,
)
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace, ids_dtype

__all__ = [
    "check_finished",
    "computations_from_reply",
    "decode_native",
    "payload_of",
    "trace_from_native_reply",
    "trace_from_reply",
]

NPY = b"\x93NUMPY"
"""How the bytes of numpy's own format begin."""


def trace_from_reply(reply: Mapping[str, Any], prompt_ids: Sequence[int], **options: Any) -> RoutingTrace:
    """Read the routes of one reply of a server with `routed_experts_format="safetensors"`.

    options: those of computations_from_reply.

    Raises:
        CaptureError: As there; or the request was retracted and computed more than once, so that no one trace is it.
        TraceError: The payload is malformed.
    """
    found = computations_from_reply(reply, prompt_ids, **options)
    if not found:
        raise CaptureError(
            f"{options.get('place', 'reply')}: aborted before any token was computed, so it has no routes"
        )
    if len(found) > 1:
        raise CaptureError(
            f"{options.get('place', 'reply')}: computed {len(found)} times, since SGLang retracted (preempted) it; "
            "read it with computations_from_reply"
        )
    return found[0].trace


def computations_from_reply(
    reply: Mapping[str, Any],
    prompt_ids: Sequence[int],
    *,
    place: str = "reply",
    moe: MoEConfig | None = None,
    start: int = 0,
    missing: Policy = "raise",
    aborted: Policy = "raise",
) -> list[Computation]:
    """Read what was computed for one reply: once, or again each time that the request was retracted.

    reply: what Engine.generate or POST /generate returned for one request.
    place: names the request in errors.
    moe: of the model that the trainer has; None to believe the reply.
    start: the request's routed_experts_start_len; the traces then hold the tokens from there on.
    missing: whether a token that was fed forward and has no route is an error, or stays as one that was not captured.
    aborted: whether a request that was aborted is an error, or gives the routes of what it computed until then.

    Returns the computations in order; each one's tokens are the front of the next one's, the last has all. None, if the
    request was aborted before anything was computed for it.

    Raises:
        CaptureError: No routes, or routes of other tokens or of another model.
        TraceError: The payload is malformed.
    """
    check_choice("missing", missing, Policy, CaptureError)
    check_finished(reply, place, aborted=aborted)
    output_ids = output_ids_of(reply, place)
    if not output_ids and was_aborted(reply, place) and reply["meta_info"].get("routed_experts") is None:
        return []
    payload = payload_of(reply, place)
    if payload[:1] == b"{" and len(payload) < 256:
        raise CaptureError(f"{place}: routes are in shared memory; say in which folder (--routed-experts-dir)")
    if payload[:6] == NPY:
        raise CaptureError(f"{place}: payload is numpy's .npy, as of vLLM; read it with r3_adapter.vllm.trace_from_npy")
    if payload[8:9] != b"{":
        raise CaptureError(
            f"{place}: payload of {len(payload)} bytes is not safetensors; "
            "start SGLang, patched, with --routed-experts-format safetensors, or read it with trace_from_native_reply"
        )
    found = read_computations(payload, place=place)
    token_ids = [*prompt_ids, *output_ids]
    check_computations(
        found, token_ids, len(prompt_ids), moe=moe, start=start, place=place, complete=missing == "raise"
    )
    return found


def check_computations(
    found: Sequence[Computation],
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    *,
    moe: MoEConfig | None,
    place: str,
    start: int = 0,
    complete: bool = True,
) -> None:
    """Check that computations are those of a sample's tokens, in order, and of the model.

    complete: each token that was fed forward must have a route.

    Raises:
        CaptureError: They are not.
    """
    _check_order(found, num_prompt_tokens, len(token_ids), start, place)
    for computation in found:
        trace = computation.trace
        _check_tokens(trace, token_ids[start : computation.stop], start, place)
        if moe is not None:
            _check_model(trace, moe, place)
        # The last token was sampled and never fed forward.
        lost = np.flatnonzero(trace.version_ids[:-1] == NOT_CAPTURED)
        if complete and len(lost):
            raise CaptureError(
                f"{place}: token {start + lost[0]} has no route, nor have {len(lost) - 1} others of {trace.num_tokens}"
            )


def trace_from_native_reply(
    reply: Mapping[str, Any],
    prompt_ids: Sequence[int],
    moe: MoEConfig,
    *,
    place: str = "reply",
    start: int = 0,
    aborted: Policy = "raise",
) -> RoutingTrace:
    """Read the routes of one reply of an unpatched server (format "flat"), or of a patched one with "exact-flat".

    They say neither tokens nor model nor weights, and have no checksum: the tokens are those of the reply, the model is
    the one of `moe`, and the weights are those that the reply's meta_info names.

    start: the request's routed_experts_start_len; the trace then holds the tokens from there on.
    aborted: whether a request that was aborted is an error, or gives the routes of what it computed until then.

    Raises:
        CaptureError: No routes, or ones that do not fit the tokens or the model.
        TraceError: A row repeats an expert.
    """
    check_finished(reply, place, aborted=aborted)
    info = info_of(reply, place)
    versions = info.get("weight_versions")
    if versions is None:
        versions = info.get("weight_version", "default")
    return decode_native(
        payload_of(reply, place),
        token_ids=[*prompt_ids, *output_ids_of(reply, place)],
        num_prompt_tokens=len(prompt_ids),
        moe=moe,
        weight_versions=versions,
        place=place,
        start=start,
    )


def decode_native(
    payload: bytes | memoryview | str,
    *,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    moe: MoEConfig,
    weight_versions: str | Sequence[Mapping[str, Any]] = "default",
    place: str = "payload",
    start: int = 0,
) -> RoutingTrace:
    """Decode SGLang's own payload: int32 [S - 1 - start, L, K], nothing in it says what it belongs to.

    payload: the bytes, or their base64.
    token_ids: prompt and output.
    weight_versions: one name for all rows, or meta_info's spans {"version", "start", "end"}, which count output
        tokens. The row of a prompt token gets the first span's version, since SGLang does not tell.
    start: position of the first token that has a row; the trace begins with it. A payload of a later one than the
        last token has no row, as one of the last token.

    Raises:
        CaptureError: The size does not fit, an id is out of range, or a dense layer has routes.
        TraceError: A row repeats an expert.

    Source: sglang@0.5.20: srt/state_capturer/routed_experts.py, srt/utils/weight_versions.py
    """
    data = from_base64(payload, place)
    start = min(check_whole("start", start, 0, error=CaptureError), len(token_ids) - 1)
    shape = (len(token_ids) - 1 - start, moe.num_layers, moe.topk)
    if len(data) != 4 * shape[0] * shape[1] * shape[2]:
        raise CaptureError(
            f"{place}: payload of {len(data)} bytes != {4 * shape[0] * shape[1] * shape[2]} of int32 {list(shape)}"
            f" (tokens - 1{f' - start {start}' if start else ''}, decoder layers, topk)"
        )
    routes = np.frombuffer(data, dtype="<i4").reshape(shape)
    return trace_of_rows(
        routes,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        moe=moe,
        weight_versions=weight_versions,
        place=place,
        start=start,
    )


def trace_of_rows(
    routes: npt.NDArray[Any],
    *,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    moe: MoEConfig,
    weight_versions: str | Sequence[Mapping[str, Any]],
    place: str,
    start: int = 0,
) -> RoutingTrace:
    """Make a trace of routes [S - 1 - start, L, K], of any integer type, of all decoder layers; see decode_native."""
    _check_native(routes, moe, place, start)
    topk_ids = np.zeros((len(routes) + 1, len(moe.captured_layer_ids), moe.topk), ids_dtype(moe.num_experts))
    topk_ids[:-1] = routes[:, list(moe.captured_layer_ids)]
    version_ids, names = version_rows(weight_versions, num_prompt_tokens, len(token_ids), place)
    try:
        return RoutingTrace(
            topk_ids=topk_ids,
            token_ids=np.asarray(token_ids[start:], np.int32),
            version_ids=version_ids[start:],
            layer_ids=np.asarray(moe.captured_layer_ids, np.int32),
            num_experts=moe.num_experts,
            weight_versions=names,
        )
    except TraceError as error:
        raise TraceError(f"{place}: {error}") from error


def _check_order(found: Sequence[Computation], num_prompt_tokens: int, num_tokens: int, start: int, place: str) -> None:
    """Check that the computations start where they should, and took turns in sampling the output."""
    sampled, starts = num_prompt_tokens, {computation.start for computation in found}
    if starts != {min(start, num_tokens - 1)}:
        raise CaptureError(f"{place}: routes from token {sorted(starts)} != {start}, the requested start")
    for index, computation in enumerate(found):
        if index and computation.sampled_start != sampled:
            raise CaptureError(
                f"{place}: computation {index} sampled from token {computation.sampled_start} != {sampled} on"
            )
        if index < len(found) - 1 and not sampled < computation.stop <= num_tokens:
            raise CaptureError(
                f"{place}: computation {index} ends at token {computation.stop} outside {sampled + 1} to {num_tokens}"
            )
        sampled = computation.stop
    if sampled != num_tokens:
        raise CaptureError(f"{place}: routes of {sampled - start} tokens != {num_tokens - start} tokens of the sample")


def _check_tokens(trace: RoutingTrace, token_ids: Sequence[int], start: int, place: str) -> None:
    if trace.num_tokens != len(token_ids):
        raise CaptureError(f"{place}: routes of {trace.num_tokens} tokens != {len(token_ids)} tokens of the sample")
    other = np.flatnonzero(trace.token_ids != np.asarray(token_ids))
    if len(other):
        at = int(other[0])
        raise CaptureError(
            f"{place}: routes of token id {trace.token_ids[at]} != {token_ids[at]} of the sample at token {start + at}"
        )


def _check_model(trace: RoutingTrace, moe: MoEConfig, place: str) -> None:
    for name, have, want in (
        ("num_experts", trace.num_experts, moe.num_experts),
        ("topk", trace.topk, moe.topk),
        ("layer_ids", trace.layer_ids.tolist(), list(moe.captured_layer_ids)),
    ):
        if have != want:
            raise CaptureError(f"{place}: routes of {name} {have} != {want} of the model")


def _check_native(routes: npt.NDArray[np.int32], moe: MoEConfig, place: str, start: int) -> None:
    bad = np.argwhere((routes < 0) | (routes >= moe.num_experts))
    if len(bad):
        token, layer, column = bad[0]
        raise CaptureError(
            f"{place}: expert {routes[token, layer, column]} at token {start + token}, layer {layer} "
            f"outside 0 to num_experts ({moe.num_experts}) - 1"
        )
    dense = sorted(set(range(moe.num_layers)) - set(moe.layer_ids))
    wrong = [layer for layer in dense if routes[:, layer].any()]
    if wrong:
        raise CaptureError(f"{place}: layer {wrong[0]} has routes, but the MoE layers are {list(moe.layer_ids)}")
