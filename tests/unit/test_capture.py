"""Replies of SGLang become traces, or errors that name the request and both operands."""

import base64
import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from r3_adapter.errors import CaptureError, R3Error, TraceError
from r3_adapter.sglang.capture import decode_native, trace_from_native_reply, trace_from_reply
from r3_adapter.sglang.engine import generate_over_http, native_bytes, samples_of
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.sampling import checked_params
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace

PROMPT, OUTPUT = [11, 12, 13], [21, 22]
MOE = MoEConfig(num_experts=8, topk=2, layer_ids=(1, 3), num_layers=4)
CHANGED = [{"version": "v1", "start": 0, "end": 1}, {"version": "v2", "start": 1, "end": 2}]


def _routes(num_tokens: int = 5, num_experts: int = 8) -> npt.NDArray[np.int32]:
    """[S - 1, L, K] int32 as SGLang has them: layers 0 and 2 are dense."""
    generator = np.random.default_rng(0)
    routes = np.zeros((num_tokens - 1, 4, 2), np.int32)
    for row in routes:
        row[1] = generator.permutation(num_experts)[:2]
        row[3] = generator.permutation(num_experts)[:2]
    return routes


def _trace(**changes: Any) -> RoutingTrace:
    topk_ids = np.zeros((5, 2, 2), np.uint8)
    topk_ids[:-1] = _routes()[:, [1, 3]]
    values: dict[str, Any] = {
        "topk_ids": topk_ids,
        "token_ids": np.array([*PROMPT, *OUTPUT], np.int32),
        "version_ids": np.array([0, 0, 0, 0, NOT_CAPTURED], np.int32),
        "layer_ids": np.array([1, 3], np.int32),
        "num_experts": 8,
        "weight_versions": ("v1",),
    }
    return RoutingTrace(**{**values, **changes})


def _reply(payload: bytes | None, **info: Any) -> dict[str, Any]:
    meta_info = {
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-0.5, token, None] for token in OUTPUT],
        "weight_version": "v1",
        **info,
    }
    if payload is not None:
        meta_info["routed_experts"] = base64.b64encode(payload).decode()
    return {"output_ids": OUTPUT, "meta_info": meta_info}


def test_a_reply_becomes_its_trace() -> None:
    trace = _trace()
    reply = _reply(trace.to_bytes())
    assert trace_from_reply(reply, PROMPT) == trace
    assert trace_from_reply(reply, PROMPT, moe=MOE, place="request 7") == trace
    reply["meta_info"]["routed_experts"] = trace.to_bytes()
    (sample,) = samples_of([reply], [PROMPT], MOE)
    assert sample.trace == trace
    assert sample.logprobs.tolist() == [-0.5, -0.5]
    assert sample.logprobs.dtype == np.float32
    assert sample.payload_bytes == len(trace.to_bytes())
    assert native_bytes(5, MOE) == _routes().nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [*PROMPT, 14]}, "request 7: routes of 5 tokens != 6 tokens of the sample"),
        ({"prompt": PROMPT[1:]}, "request 7: routes of 5 tokens != 4"),
        ({"prompt": [11, 99, 13]}, "request 7: routes of token id 12 != 99 of the sample at token 1"),
        ({"output": [22, 21]}, "request 7: routes of token id 21 != 22 of the sample at token 3"),
        ({"moe": MoEConfig(16, 2, (1, 3), 4)}, "request 7: routes of num_experts 8 != 16 of the model"),
        ({"moe": MoEConfig(8, 1, (1, 3), 4)}, "request 7: routes of topk 2 != 1 of the model"),
        ({"moe": MoEConfig(8, 2, (2, 3), 4)}, "request 7: routes of layer_ids [1, 3] != [2, 3] of the model"),
        ({"payload": None}, "request 7: no routed_experts in meta_info"),
        ({"payload": b""}, "request 7: payload of 0 bytes is not safetensors"),
        ({"payload": _routes().tobytes()}, "request 7: payload of 128 bytes is not safetensors"),
        ({"payload": _trace().to_bytes()[:-1]}, "request 7: "),
        ({"payload": None, "info": {"routed_experts": "not base64"}}, "request 7: routed_experts is not base64"),
        ({"info": {"finish_reason": {"type": "abort", "message": "gone"}}}, "request 7: finish_reason .*abort"),
        ({"info": {"finish_reason": None}}, "request 7: finish_reason None"),
    ],
)
def test_a_reply_that_does_not_belong_to_the_sample_is_refused(change: dict[str, Any], message: str) -> None:
    reply = _reply(change.get("payload", _trace().to_bytes()), **change.get("info", {}))
    reply["output_ids"] = change.get("output", OUTPUT)
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(R3Error, match=pattern):
        trace_from_reply(reply, change.get("prompt", PROMPT), moe=change.get("moe", MOE), place="request 7")


def test_an_error_in_place_of_a_reply_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"reply: not a reply: .*overloaded"):
        trace_from_reply({"error": {"message": "overloaded"}}, PROMPT)
    with pytest.raises(CaptureError, match="reply: no output_ids"):
        trace_from_reply({"text": "", "meta_info": {"finish_reason": {"type": "stop"}}}, PROMPT)
    with pytest.raises(CaptureError, match="1 replies != 2 prompts"):
        samples_of([_reply(None)], [PROMPT, PROMPT], MOE)


def test_a_token_without_a_route_is_refused_unless_asked_for() -> None:
    topk_ids = _trace().topk_ids.copy()
    topk_ids[2] = 0
    trace = _trace(topk_ids=topk_ids, version_ids=np.array([0, 0, -1, 0, -1], np.int32))
    reply = _reply(trace.to_bytes())
    with pytest.raises(CaptureError, match="reply: token 2 has no route, nor have 0 others of 5"):
        trace_from_reply(reply, PROMPT)
    assert trace_from_reply(reply, PROMPT, missing="keep") == trace


def test_log_probabilities_of_other_tokens_are_refused() -> None:
    reply = _reply(_trace().to_bytes(), output_token_logprobs=[[-0.5, 21, None], [-0.5, 23, None]])
    with pytest.raises(CaptureError, match="request 0: the 2 tokens of output_token_logprobs are not the output_ids"):
        samples_of([reply], [PROMPT], MOE)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_native_payload_is_cut_to_the_moe_layers(as_text: bool) -> None:
    data = _routes().tobytes()
    payload = base64.b64encode(data).decode() if as_text else data
    trace = decode_native(payload, token_ids=[*PROMPT, *OUTPUT], num_prompt_tokens=3, moe=MOE, weight_versions="v1")
    assert trace == _trace()
    assert trace_from_native_reply(_reply(data), PROMPT, MOE) == _trace()


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_a_native_payload_may_start_later(start: int) -> None:
    whole = trace_from_native_reply(_reply(_routes().tobytes(), weight_versions=CHANGED), PROMPT, MOE)
    reply = _reply(_routes()[start:].tobytes(), weight_versions=CHANGED)
    trace = trace_from_native_reply(reply, PROMPT, MOE, start=start)
    assert trace == whole.rows(min(start, 4), 5)
    for other in {0, 1, 3} - {start}:
        with pytest.raises(CaptureError, match=rf"reply: payload of .* != .* of int32 \[{4 - other}, 4, 2\]"):
            trace_from_native_reply(reply, PROMPT, MOE, start=other)


def test_an_error_of_a_later_start_names_the_token_of_the_sample() -> None:
    reply = _reply(_damaged(2, 3, [1, 8])[2 * 4 * 2 * 4 :])
    with pytest.raises(CaptureError, match="expert 8 at token 2, layer 3"):
        trace_from_native_reply(reply, PROMPT, MOE, start=2)


def test_a_native_reply_of_an_aborted_request_is_read_if_asked_for() -> None:
    reply = _reply(_routes().tobytes(), finish_reason={"type": "abort", "message": "gone"})
    with pytest.raises(CaptureError, match=r"finish_reason .*abort"):
        trace_from_native_reply(reply, PROMPT, MOE)
    assert trace_from_native_reply(reply, PROMPT, MOE, aborted="keep") == _trace()


def test_ids_beyond_a_byte_become_uint16() -> None:
    moe = MoEConfig(300, 2, (1, 3), 4)
    routes = _routes(num_experts=300)
    trace = decode_native(routes.tobytes(), token_ids=[*PROMPT, *OUTPUT], num_prompt_tokens=3, moe=moe)
    assert trace.topk_ids.dtype == np.uint16
    assert np.array_equal(trace.topk_ids[:-1], routes[:, [1, 3]])


def test_native_rows_get_the_version_that_computed_them() -> None:
    trace = trace_from_native_reply(_reply(_routes().tobytes(), weight_versions=CHANGED), PROMPT, MOE)
    # Output token 0 is computed by the last prompt token's row, output token 1 by the row of output token 0.
    assert trace.version_ids.tolist() == [0, 0, 0, 1, -1]
    assert trace.weight_versions == ("v1", "v2")


def _damaged(token: int, layer: int, row: list[int]) -> bytes:
    routes = _routes()
    routes[token, layer] = row
    return routes.tobytes()


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        (_routes(4).tobytes(), CaptureError, r"request 7: payload of 96 bytes != 128 of int32 \[4, 4, 2\]"),
        (_damaged(2, 3, [1, 8]), CaptureError, r"request 7: expert 8 at token 2, layer 3 outside .*\(8\)"),
        (_damaged(2, 3, [1, -1]), CaptureError, "request 7: expert -1 at token 2, layer 3 outside"),
        (_damaged(2, 2, [1, 2]), CaptureError, r"request 7: layer 2 has routes, but the MoE layers are \[1, 3\]"),
        (_damaged(2, 3, [5, 5]), TraceError, "request 7: .*token 2, layer 3: .*1 distinct ids"),
        (_damaged(2, 3, [0, 0]), TraceError, "request 7: .*token 2, layer 3"),
    ],
)
def test_a_native_payload_that_does_not_fit_is_refused(payload: bytes, error: type[R3Error], message: str) -> None:
    with pytest.raises(error, match=message):
        decode_native(payload, token_ids=[*PROMPT, *OUTPUT], num_prompt_tokens=3, moe=MOE, place="request 7")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (CHANGED[:1], "end at output token 1 != 2"),
        (CHANGED[1:], "a span starts at 1 != 0"),
        ([*CHANGED, {"version": "v3", "start": 2, "end": 3}], "end at output token 3 != 2"),
    ],
)
def test_version_spans_that_do_not_fit_are_refused(spans: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        trace_from_native_reply(_reply(_routes().tobytes(), weight_versions=spans), PROMPT, MOE)


def test_samples_of_a_running_server(monkeypatch: pytest.MonkeyPatch, answers: Any) -> None:
    def server(status: int, answer: Any) -> Any:
        return answers(json.dumps(answer).encode(), status)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    params = {"temperature": 1.0, "max_new_tokens": 2}
    with server(200, [_reply(_trace().to_bytes())]) as (url, asked):
        (sample,) = generate_over_http(url, [PROMPT], params, MOE)
    assert sample.trace == _trace()
    ((path, body),) = asked
    assert path == "/generate"
    assert json.loads(body) == {
        "input_ids": [PROMPT],
        "sampling_params": checked_params(params),
        "return_logprob": True,
        "return_routed_experts": True,
    }
    with pytest.raises(CaptureError, match=rf"{url}: .*refused"):
        generate_over_http(url, [PROMPT], params, MOE)
    with (
        server(400, {"error": {"message": "too long"}}) as (url, _),
        pytest.raises(CaptureError, match=r"400.*long"),
    ):
        generate_over_http(url, [PROMPT], params, MOE)
    with server(200, [_reply(None)]) as (url, _), pytest.raises(CaptureError, match=f"{url} request 0: no routed_exp"):
        generate_over_http(url, [PROMPT], params, MOE)
