"""One uninterrupted computation of a request, as its payload describes it; turns of a conversation joined to one.

A token's log-probability belongs to one computation of the tokens before it. SGLang computes the tokens of a request
again if it retracts (preempts) the request, or pauses with retraction. Its payload then holds each computation in turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from r3_adapter.errors import CaptureError, TraceError, show
from r3_adapter.trace import RoutingTrace, concatenate
from r3_adapter.wire import as_buffer, read_header

_POSITIONS = {"start", "sampled_start", "previous_row", "last_row"}


@dataclass(frozen=True, eq=False)
class Computation:
    """The routes of tokens that one computation covers, each on top of those before it, and what it sampled.

    trace: of the tokens from `start` on.
    start: position of the first token.
    sampled_start: position of the first token that this computation sampled, where an earlier one sampled some; None
        where that is the first output token.
    previous_row: the engine's name for the computation of the token before `start`; None if that is 0, or not known.
    last_row: the same of the last token that was fed forward.
    """

    trace: RoutingTrace
    start: int = 0
    sampled_start: int | None = None
    previous_row: str | None = None
    last_row: str | None = None

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.trace.num_tokens


def read_computations(payload: bytes | memoryview, *, place: str = "payload") -> list[Computation]:
    """Read a payload of format safetensors; one computation, or more if the request was retracted.

    Raises:
        TraceError: It is malformed, or its checksum is missing or another.

    Source: patches/sglang: srt/state_capturer/routed_experts_safetensors.py
    """
    buffer, at, found = as_buffer(payload, place), 0, list[Computation]()
    while at < len(buffer) or not found:
        where = f"{place}, computation {len(found)}" if found else place
        header = read_header(buffer[at:], where)
        size, metadata = header.stop, header.metadata
        # A digest is of the trace alone: it does not say where in the sample the trace lies.
        if "checksum" not in metadata and metadata.keys() & _POSITIONS:
            raise TraceError(f"{where}: no checksum in the header")
        trace = RoutingTrace.from_bytes(buffer[at : at + size], place=where)
        found.append(
            Computation(
                trace,
                start=_position(metadata, "start", where) or 0,
                sampled_start=_position(metadata, "sampled_start", where),
                previous_row=metadata.get("previous_row"),
                last_row=metadata.get("last_row"),
            )
        )
        at += size
    return found


def join_turns(first: Computation, second: Computation, *, place: str = "turn") -> Computation:
    """Join a turn's routes, asked for from `routed_experts_start_len` on, to those of the turns before it.

    first: ends with the token that its turn sampled last, which was not fed forward and so has no route.
    second: starts with that token, at `first.stop - 1`.

    Raises:
        CaptureError: The second does not continue the first: other tokens, another model, or computed on other rows
            than the first's (they were evicted or belong to another engine). Ask again from start 0.
    """
    one, other = first.trace, second.trace
    if second.start != first.stop - 1:
        raise CaptureError(f"{place}: starts at token {second.start} != {first.stop - 1}, the first without a route")
    if one.token_ids[-1] != other.token_ids[0]:
        raise CaptureError(
            f"{place}: token id {other.token_ids[0]} at token {second.start} != {one.token_ids[-1]} of the turn before"
        )
    if first.last_row is None or second.previous_row != first.last_row:
        raise CaptureError(
            f"{place}: follows row {second.previous_row} != {first.last_row}, the last row of the turn before"
        )
    for name, have, want in (
        ("num_experts", other.num_experts, one.num_experts),
        ("topk", other.topk, one.topk),
        ("layer_ids", other.layer_ids.tolist(), one.layer_ids.tolist()),
        ("model", other.model, one.model),
    ):
        if have != want:
            raise CaptureError(f"{place}: routes of {name} {have} != {want} of the turn before")
    return Computation(
        concatenate([one.rows(0, one.num_tokens - 1), other]),
        first.start,
        second.sampled_start,
        first.previous_row,
        second.last_row,
    )


def _position(metadata: Mapping[str, str], name: str, place: str) -> int | None:
    text = metadata.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise TraceError(f"{place}: {name} {show(text)} is not a position")
    return int(text)
