"""Whatever a server answers: a reply is read, or an R3Error says what is wrong with it."""

import base64
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import R3Error
from r3_adapter.sglang.capture import computations_from_reply, trace_from_native_reply
from r3_adapter.sglang.conversation import Conversation
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.openai import events_of, sample_of_openai
from r3_adapter.sglang.samples import samples_of
from r3_adapter.sglang.shared import fetch_payload
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace

PROMPT, OUTPUT = [11, 12, 13], [21, 22]
MOE = MoEConfig(num_experts=8, topk=2, layer_ids=(0, 1), num_layers=2)
ASKED = {"temperature": 0.5, "repetition_penalty": 1.0, "logprobs": True}
ROUNDS = 1500


def _trace() -> RoutingTrace:
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.uint8), (5, 2, 1)), axis=2)[..., :2].copy()
    versions = np.array([0, 0, 0, 0, NOT_CAPTURED], np.int32)
    rows[-1] = 0
    return RoutingTrace(
        rows, np.array([*PROMPT, *OUTPUT], np.int32), versions, np.arange(2, dtype=np.int32), 8, ("v1",)
    )


PAYLOAD = base64.b64encode(_trace().to_bytes()).decode()
NATIVE = base64.b64encode(_trace().topk_ids[:-1].astype("<i4").tobytes()).decode()
INFO = {
    "finish_reason": {"type": "length", "length": 2},
    "output_token_logprobs": [[-0.5, 21, None], [-0.25, 22, None]],
    "weight_versions": [{"version": "v1", "start": 0, "end": 1}, {"version": "v2", "start": 1, "end": 2}],
    "routed_experts": PAYLOAD,
}
REPLY = {"output_ids": OUTPUT, "meta_info": INFO}
COMPLETION = {
    "choices": [{"index": 0, "text": "ab", "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5, -0.25]}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    "sglext": {"routed_experts": PAYLOAD},
}
CONTENT = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]
CHAT = [
    {"choices": [{"index": 0, "delta": {"role": "assistant"}, "logprobs": {"content": CONTENT[:1]}}]},
    {"choices": [{"index": 0, "delta": {"content": "b"}, "logprobs": {"content": CONTENT[1:]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": {"prompt_tokens": 3}},
    {"choices": [], "sglext": {"routed_experts": PAYLOAD, "input_ids": PROMPT}},
]
READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "samples": (REPLY, lambda reply: samples_of([reply], [PROMPT], MOE)),
    "replies": ([REPLY], lambda replies: samples_of(replies, [PROMPT], MOE)),
    "aborted": (REPLY, lambda reply: computations_from_reply(reply, PROMPT, aborted="keep", missing="keep")),
    "native": (
        {**REPLY, "meta_info": {**INFO, "routed_experts": NATIVE}},
        lambda reply: trace_from_native_reply(reply, PROMPT, MOE),
    ),
    "turn": (REPLY, lambda reply: Conversation(PROMPT, MOE).take(reply)),
    "completion": (COMPLETION, lambda reply: sample_of_openai(reply, ASKED, MOE)),
    "chat stream": (CHAT, lambda events: sample_of_openai(events, ASKED, MOE)),
}


def _deep() -> Any:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    return value


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    5,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e400,
    "",
    "stop",
    "abort",
]
ODD += [
    "AAAA",
    "\ud800",
    [],
    [None],
    {},
    {"type": "abort"},
    {"error": {"message": "no"}},
    {"x": 1},
    _deep(),
    PAYLOAD[:-8],
]


def _mutated(value: Any, random: random.Random) -> Any:
    """Return a copy in which one place, at any depth, is another value, missing, or there twice."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        if random.random() < 0.15:
            return {key: each for key, each in value.items() if key != name}
        return {**value, name: _mutated(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        if random.random() < 0.3:
            return [*value[:at], *value[at + 1 :]] if random.random() < 0.5 else [*value[:at], value[at], *value[at:]]
        return [*value[:at], _mutated(value[at], random), *value[at + 1 :]]
    if isinstance(value, str) and value and random.random() < 0.5:
        at = random.randrange(len(value))
        return value[:at] + random.choice("A9=\n{") + value[at + 1 :]
    return random.choice(ODD)


@pytest.mark.parametrize("name", READERS)
def test_an_odd_reply_is_read_or_refused(name: str) -> None:
    right, read = READERS[name]
    assert read(right) is not None
    refused = 0
    for seed in range(ROUNDS):
        reply = _mutated(right, random.Random(f"{name} {seed}"))
        try:
            read(reply)
        except R3Error as error:
            refused += 1
            assert len(str(error)) < 2000
    assert refused > ROUNDS / 4


@pytest.mark.parametrize(
    "reply", [None, 5, "text", [None], {"error": {}}, {"meta_info": 5}, {"meta_info": {}}, _deep()]
)
def test_what_is_no_reply_is_refused(reply: Any, tmp_path: Any) -> None:
    for _, read in READERS.values():
        with pytest.raises(R3Error):
            read(reply)
    with pytest.raises(R3Error):
        fetch_payload({"meta_info": {"routed_experts": base64.b64encode(b"{[}").decode()}}, tmp_path, "reply")


def test_an_abort_before_any_forward_pass_is_empty() -> None:
    aborted = {"meta_info": {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}}
    for reply in (aborted, {**aborted, "output_ids": []}):
        assert computations_from_reply(reply, PROMPT, aborted="keep") == []
        with pytest.raises(R3Error, match=r"request 0: finish_reason .*Abort in waiting queue.* != stop or length"):
            samples_of([reply], [PROMPT], MOE)


def test_a_stream_ends() -> None:
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in CHAT)
    sample = sample_of_openai(events_of(text + "data: [DONE]\n\n"), ASKED, MOE)
    assert (sample.temperature, sample.num_prompt_tokens, sample.logprobs.tolist()) == (0.5, 3, [-0.5, -0.25])
    for bad in (
        text,
        "",
        text + "data: [5}\n\ndata: [DONE]\n",
        "data: 5\ndata: [DONE]",
        f"data: {'[' * 100000}\ndata: [DONE]",
    ):
        with pytest.raises(R3Error, match="stream"):
            events_of(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": None}, "request has no temperature"),
        ({"repetition_penalty": None}, "request has no repetition_penalty"),
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2 changes"),
        ({"frequency_penalty": 0.5}, "frequency_penalty 0.5 changes"),
        ({"min_tokens": 3}, "min_new_tokens 3 changes"),
        ({"n": 2}, "n 2 changes"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice 'required' != 'auto' or 'none'"),
        ({"tools": [{"function": {"name": "f", "strict": True}}]}, "a strict tool is a grammar"),
        ({"response_format": {"type": "json_object"}}, "response_format .* is a grammar"),
        ({"custom_logit_processor": "x"}, "what custom_logit_processor does"),
    ],
)
def test_a_request_that_changes_the_scores_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(R3Error, match=message):
        sample_of_openai(COMPLETION, {**ASKED, **change}, MOE)


def test_a_chat_stream_without_all_log_probabilities_is_refused() -> None:
    with pytest.raises(
        R3Error, match=r"log-probabilities of 1 tokens != 2 that were sampled; a chat stream leaves out"
    ):
        sample_of_openai([*CHAT[1:]], ASKED, MOE)
    with pytest.raises(R3Error, match="the reply does not say how long the prompt is"):
        sample_of_openai([*CHAT[:3], {"choices": [], "sglext": {"routed_experts": PAYLOAD}}], ASKED, MOE)
