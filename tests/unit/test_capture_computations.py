"""Payloads of several computations, segments of a conversation: read exactly, joined only where they continue."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError, R3Error, TraceError
from r3_adapter.sglang.capture import computations_from_reply, trace_from_reply
from r3_adapter.sglang.computation import Computation, join_turns, read_computations
from r3_adapter.sglang.engine import samples_of
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace
from r3_adapter.wire import write_tensors

TOKENS = [11, 12, 13, 21, 22, 23, 24, 25]
PROMPT, OUTPUT = TOKENS[:3], TOKENS[3:]
MOE = MoEConfig(num_experts=8, topk=2, layer_ids=(1, 3), num_layers=4)


def _trace(start: int, stop: int, *, seed: int = 0, version: str = "v1", tokens: list[int] = TOKENS) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    rows = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in TOKENS]).astype(np.uint8)[start:stop]
    versions = np.zeros(stop - start, np.int32)
    rows[-1], versions[-1] = 0, NOT_CAPTURED
    layer_ids = np.array([1, 3], np.int32)
    return RoutingTrace(rows, np.array(tokens[start:stop], np.int32), versions, layer_ids, 8, (version,))


def _payload(trace: RoutingTrace, **metadata: str) -> bytes:
    """What the engine writes: a checksum, no digest."""
    arrays = {name: getattr(trace, name) for name in ("topk_ids", "token_ids", "version_ids", "layer_ids")}
    versions = json.dumps(trace.weight_versions)
    known = {"format": "r3.routing_trace/1", "num_experts": str(trace.num_experts), "weight_versions": versions}
    return write_tensors(arrays, {**known, "checksum": "", **metadata})


def _reply(payload: bytes, output: list[int] = OUTPUT, reason: str = "length") -> dict[str, Any]:
    pairs = [[-float(at), token, None] for at, token in enumerate(output)]
    info = {"routed_experts": payload, "finish_reason": {"type": reason}, "output_token_logprobs": pairs}
    return {"output_ids": output, "meta_info": info}


def _twice(**changes: str) -> bytes:
    """Retracted after two output tokens."""
    return _payload(_trace(0, 5), last_row="e:3") + _payload(
        _trace(0, 8, seed=1, version="v2"), **{"last_row": "e:20", "sampled_start": "5", **changes}
    )


def test_a_retracted_request_has_a_trace_for_each_computation() -> None:
    first, second = computations_from_reply(_reply(_twice()), PROMPT, moe=MOE)
    assert (first.trace, first.sampled_start, first.stop, first.last_row) == (_trace(0, 5), None, 5, "e:3")
    assert second.trace == _trace(0, 8, seed=1, version="v2")
    assert (second.start, second.sampled_start, second.stop, second.previous_row) == (0, 5, 8, None)


def test_a_retracted_request_is_split_into_samples_if_asked_for() -> None:
    reply, once = _reply(_twice()), _reply(_payload(_trace(0, 8)))
    with pytest.raises(CaptureError, match="request 1: computed 2 times, since SGLang retracted"):
        samples_of([once, reply], [PROMPT, PROMPT], MOE)
    with pytest.raises(CaptureError, match="reply: computed 2 times"):
        trace_from_reply(reply, PROMPT)
    samples = samples_of([once, reply], [PROMPT, PROMPT], MOE, recomputed="split")
    assert [sample.num_prompt_tokens for sample in samples] == [3, 3, 5]
    assert [sample.logprobs.tolist() for sample in samples[1:]] == [[0, -1], [-2, -3, -4]]
    assert [sample.trace.num_tokens for sample in samples] == [8, 5, 8]
    assert sum(sample.payload_bytes for sample in samples[1:]) == len(_twice())


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (_twice(sampled_start="4"), "reply: computation 1 sampled from token 4 != 5 on"),
        (_twice(sampled_start="-5"), "reply, computation 1: sampled_start '-5' is not a position"),
        (_payload(_trace(0, 8)) + _payload(_trace(0, 8)), "reply: computation 1 sampled from token None != 8"),
        (_payload(_trace(0, 3)) + _payload(_trace(0, 8)), "reply: computation 0 ends at token 3 outside 4 to 8"),
        (_payload(_trace(0, 8)) + b"rest", "reply, computation 1: 4 bytes have no header"),
        (_payload(_trace(0, 8))[:-3], "reply: tensors end at byte .* of "),
        (_payload(_trace(0, 5)), "reply: routes of 5 tokens != 8 tokens of the sample"),
        (_payload(_trace(2, 8), start="2"), r"reply: routes from token \[2\] != 0, the requested start"),
        (_payload(_trace(0, 8), start="x"), "reply: start 'x' is not a position"),
        (_payload(_trace(0, 8)).replace(b'"checksum"', b'"checksam"'), "reply: neither a checksum nor a digest"),
        (_twice().replace(b'"sampled_start":"5"', b'"sampled_start":"6"'), "reply, computation 1: checksum .* != "),
        (
            _payload(_trace(0, 8), digest=_trace(0, 8).digest(), start="0").replace(b'"checksum"', b'"checksam"'),
            "reply: no checksum in the header",
        ),
        (_payload(_trace(0, 8, tokens=[*TOKENS[:5], 99, 24, 25])), "routes of token id 99 != 23 .* at token 5"),
    ],
)
def test_computations_that_do_not_belong_to_the_sample_are_refused(payload: bytes, message: str) -> None:
    with pytest.raises(R3Error, match=message):
        computations_from_reply(_reply(payload), PROMPT, moe=MOE)


def test_routes_from_a_later_start() -> None:
    payload = _payload(_trace(2, 8), start="2", previous_row="e:1", last_row="e:6")
    (found,) = computations_from_reply(_reply(payload), PROMPT, start=2)
    assert (found.trace, found.start, found.previous_row) == (_trace(2, 8), 2, "e:1")
    with pytest.raises(CaptureError, match=r"routes from token \[2\] != 1"):
        computations_from_reply(_reply(payload), PROMPT, start=1)


def test_an_aborted_request_is_kept_if_asked_for() -> None:
    reply = _reply(_payload(_trace(0, 5)), OUTPUT[:2], "abort")
    with pytest.raises(CaptureError, match=r"finish_reason .*abort"):
        computations_from_reply(reply, PROMPT)
    (found,) = computations_from_reply(reply, PROMPT, aborted="keep")
    assert found.trace == _trace(0, 5)


@pytest.mark.parametrize("header", [b"", b"{}", b"[]", b'{"__metadata__": 3}', b'{"__metadata__": {}, "a": {}}'])
def test_hostile_headers_are_refused(header: bytes) -> None:
    with pytest.raises(TraceError, match="payload: "):
        read_computations(len(header).to_bytes(8, "little") + header)


FIRST = Computation(_trace(0, 5), last_row="e:3")
SECOND = Computation(_trace(4, 8, version="v2"), start=4, previous_row="e:3", last_row="e:6")


def test_turns_become_one_trace() -> None:
    joined = join_turns(FIRST, SECOND)
    want = _trace(0, 8)
    assert np.array_equal(joined.trace.topk_ids, want.topk_ids)
    assert np.array_equal(joined.trace.token_ids, want.token_ids)
    assert joined.trace.version_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, -1]
    assert joined.trace.weight_versions == ("v1", "v2")
    assert (joined.start, joined.stop, joined.previous_row, joined.last_row) == (0, 8, None, "e:6")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 5}, "turn: starts at token 5 != 4, the first without a route"),
        ({"previous_row": "e:4"}, "turn: follows row e:4 != e:3, the last row of the turn before"),
        ({"previous_row": None}, "turn: follows row None != e:3"),
        ({"trace": _trace(4, 8, tokens=[0] * 8)}, "turn: token id 0 at token 4 != 22 of the turn before"),
        ({"trace": replace(_trace(4, 8), num_experts=9)}, "turn: routes of num_experts 9 != 8"),
        ({"trace": replace(_trace(4, 8), layer_ids=np.array([1, 2], np.int32))}, "routes of layer_ids"),
    ],
)
def test_turns_that_do_not_continue_are_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        join_turns(FIRST, replace(SECOND, **changes))


def test_turns_of_an_engine_that_names_no_rows_are_refused() -> None:
    with pytest.raises(CaptureError, match="follows row None != None"):
        join_turns(replace(FIRST, last_row=None), replace(SECOND, previous_row=None))
