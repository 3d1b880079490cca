"""Read an engine's replies: each value is checked here, or an error says what is wrong with it.

R: output tokens of a reply.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import CaptureError, check_choice, show

Policy = Literal["raise", "keep"]
_MAX_ID = 2**31 - 1


def info_of(reply: Any, place: str) -> Mapping[str, Any]:
    """Return a reply's meta_info.

    Raises:
        CaptureError: It is an error in place of a reply, or something else.
    """
    info = reply.get("meta_info") if isinstance(reply, Mapping) else None
    if not isinstance(info, Mapping):
        raise CaptureError(f"{place}: not a reply: {_said(reply)}")
    return info


def check_finished(reply: Any, place: str, *, aborted: Policy = "raise") -> None:
    """Refuse an error in place of a reply, and, unless asked to keep it, a request that was aborted.

    Raises:
        CaptureError: It is one of these.
    """
    check_choice("aborted", aborted, Policy, CaptureError)
    reason = info_of(reply, place).get("finish_reason")
    kind = reason.get("type") if isinstance(reason, Mapping) else None
    if kind not in ("stop", "length", "abort") or (aborted == "raise" and kind == "abort"):
        raise CaptureError(f"{place}: finish_reason {_said(reason)} != stop or length")


def was_aborted(reply: Any, place: str) -> bool:
    """Tell whether a request was aborted; see check_finished."""
    check_finished(reply, place, aborted="keep")
    return bool(info_of(reply, place)["finish_reason"]["type"] == "abort")


def output_ids_of(reply: Any, place: str) -> list[int]:
    """Return [R] the output's token ids; none of a request that was aborted before it had any.

    Raises:
        CaptureError: They are missing, or no token ids.
    """
    found = reply.get("output_ids")
    if found is None and was_aborted(reply, place):
        return []
    if found is None:
        raise CaptureError(f"{place}: no output_ids in the reply")
    return token_ids_of(found, f"{place}: output_ids")


def token_ids_of(found: Any, place: str) -> list[int]:
    """Return a list of token ids.

    Raises:
        CaptureError: It is something else.
    """
    if not isinstance(found, list | tuple):
        raise CaptureError(f"{place}: {show(found)} is not a list of token ids")
    if not set(map(type, found)) <= {int} or not all(0 <= token <= _MAX_ID for token in found):
        wrong = next(token for token in found if type(token) is not int or not 0 <= token <= _MAX_ID)
        raise CaptureError(f"{place}: {show(wrong)} is no token id")
    return list(found)


def payload_of(reply: Any, place: str) -> bytes | memoryview:
    """Return the bytes of a reply's routes, in either form; the file that a handle names is not read.

    Raises:
        CaptureError: There are none, or no base64.
    """
    payload = info_of(reply, place).get("routed_experts")
    if payload is None:
        if was_aborted(reply, place) and not output_ids_of(reply, place):
            raise CaptureError(f"{place}: aborted before any token was computed, so it has no routes")
        raise CaptureError(
            f"{place}: no routed_experts in meta_info; start SGLang with --enable-return-routed-experts "
            "and ask with return_routed_experts"
        )
    return from_base64(payload, place)


def from_base64(payload: Any, place: str) -> bytes | memoryview:
    """Return the bytes of a payload: of base64, or as they are.

    Raises:
        CaptureError: It is neither.
    """
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload) if isinstance(payload, bytearray) else payload
    if not isinstance(payload, str):
        raise CaptureError(f"{place}: routed_experts {show(payload)} is neither bytes nor base64")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CaptureError(f"{place}: routed_experts is not base64: {error}") from error


def logprobs_of(reply: Any, place: str, *, aborted: Policy = "raise") -> npt.NDArray[np.float32]:
    """Return [R] float32, the log-probability of each output token.

    Raises:
        CaptureError: There are none, they are of other tokens, or one is no log-probability.
    """
    check_finished(reply, place, aborted=aborted)
    pairs = info_of(reply, place).get("output_token_logprobs")
    if pairs is None:
        raise CaptureError(f"{place}: no output_token_logprobs in meta_info; ask with return_logprob")
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) > 1 for pair in pairs
    ):
        raise CaptureError(f"{place}: output_token_logprobs {show(pairs)} are not pairs of log-probability and token")
    if [pair[1] for pair in pairs] != output_ids_of(reply, place):
        raise CaptureError(f"{place}: the {len(pairs)} tokens of output_token_logprobs are not the output_ids")
    return as_logprobs([pair[0] for pair in pairs], place)


def as_logprobs(values: Sequence[Any], place: str) -> npt.NDArray[np.float32]:
    """Return [R] float32, log-probabilities.

    Raises:
        CaptureError: One is no number, not finite, or above 0.
    """
    if not set(map(type, values)) <= {float, int}:
        at = next(at for at, value in enumerate(values) if type(value) not in (float, int))
        raise CaptureError(f"{place}: log-probability {show(values[at])} of output token {at} is no number")
    try:
        found = np.array(values, np.float32)
    except (OverflowError, ValueError) as error:
        raise CaptureError(f"{place}: log-probabilities are no numbers: {error}") from error
    wrong = np.flatnonzero(~(np.isfinite(found) & (found <= 0)))
    if len(wrong):
        at = int(wrong[0])
        raise CaptureError(
            f"{place}: log-probability {show(values[at])} of output token {at} is not finite and at most 0"
        )
    return found


def version_rows(
    versions: Any, num_prompt_tokens: int, num_tokens: int, place: str
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Return version_ids [S] int32 and the versions' names; output token j was computed by the row before it.

    versions: one name for all rows, or spans {"version", "start", "end"}, which count output tokens.

    Raises:
        CaptureError: They are neither, or do not cover the output.
    """
    num_outputs = num_tokens - num_prompt_tokens
    spans = [{"version": versions, "start": 0, "end": num_outputs}] if isinstance(versions, str) else versions
    names, version_ids, at = list[str](), np.full(num_tokens, -1, np.int32), 0
    if not isinstance(spans, list | tuple):
        raise CaptureError(f"{place}: weight_versions {show(versions)} are neither a name nor spans")
    for span in spans:
        values = [span.get(name) for name in ("version", "start", "end")] if isinstance(span, Mapping) else [None] * 3
        name, start, end = values
        if not isinstance(name, str) or type(start) is not int or type(end) is not int or end < at:
            raise CaptureError(f"{place}: weight_versions: {show(span)} is no span of {num_outputs} output tokens")
        if start != at:
            raise CaptureError(f"{place}: weight_versions {show(spans)}: a span starts at {start} != {at}")
        if name not in names:
            names.append(name)
        at = end
        first = 0 if start == 0 else num_prompt_tokens - 1 + start
        version_ids[first : num_prompt_tokens - 1 + at] = names.index(name)
    if at != num_outputs:
        raise CaptureError(f"{place}: weight_versions end at output token {at} != {num_outputs}")
    version_ids[-1] = -1
    return version_ids, tuple(names)


def _said(found: Any) -> str:
    """Return the text that came in place of a reply, cut if it is long."""
    try:
        return str(dict(found) if isinstance(found, Mapping) else found)[:500]
    except (RecursionError, ValueError):
        return show(found)
