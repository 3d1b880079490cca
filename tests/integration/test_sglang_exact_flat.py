"""Upstream's form, our rows: `--routed-experts-format exact-flat` on a real server with perturbed experts.

Replies are decoded as trainers do it, from the request's tokens, layers and top-k alone. Hugging Face's model replays
them: every output token's log-probability must be the server's. What the form cannot tell ends with an error.
"""

import base64
import importlib.util
import json
import urllib.error
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from r3_adapter.sglang.capture import trace_from_native_reply
from r3_adapter.sglang.computation import Computation
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import RoutingTrace

SPEC = importlib.util.spec_from_file_location("sglang_server", Path(__file__).with_name("sglang_server.py"))
sglang = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang)
EXACT, Server, make_prompts = sglang.EXACT, sglang.Server, sglang.make_prompts

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

TOPK = 2
STALE = "tokens have rows of the weights"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with sglang.serve_strained(tmp_path_factory.mktemp("server"), routed_experts_format="exact-flat") as found:
        yield found


def _decode(payload: str, num_tokens: int, start: int = 0) -> npt.NDArray[np.int32]:
    """Return [S - 1 - start, L, K] int32, as trainers decode it."""
    flat = np.frombuffer(base64.b64decode(payload), np.int32)
    return flat.reshape(num_tokens - 1 - start, sglang.LAYERS, TOPK)


def _trace(rows: npt.NDArray[np.int32], tokens: Sequence[int], version: str = "v1") -> RoutingTrace:
    topk_ids = np.zeros((len(tokens), sglang.LAYERS, TOPK), np.uint8)
    topk_ids[:-1] = rows
    return RoutingTrace(
        topk_ids=topk_ids,
        token_ids=np.asarray(tokens, np.int32),
        version_ids=np.array([0] * (len(tokens) - 1) + [-1], np.int32),
        layer_ids=np.arange(sglang.LAYERS, dtype=np.int32),
        num_experts=8,
        weight_versions=(version,),
    )


def _check(server: Server, reply: Any, prompt: Sequence[int], version: str = "v1") -> RoutingTrace:
    """Check a reply's rows against the reference, and what the adapter reads; return the trace."""
    tokens = [*prompt, *reply["output_ids"]]
    trace = _trace(_decode(reply["meta_info"]["routed_experts"], len(tokens)), tokens, version)
    assert server.worst(reply, prompt, [Computation(trace)]) <= EXACT
    moe = MoEConfig.from_checkpoint(server.weights["v1"])
    read = trace_from_native_reply(reply, prompt, moe, aborted="keep")
    assert np.array_equal(read.topk_ids, trace.topk_ids) and read.weight_versions == (version,)
    return trace


def _refused(server: Server, path: str, body: Any) -> str:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.open(path, body)
    assert refused.value.code == 500
    return refused.value.read().decode()


@pytest.mark.parametrize("length", [12, 80])
def test_samples_of_one_prompt(server: Server, length: int) -> None:
    (prompt,) = make_prompts(1, [length])
    traces = [_check(server, reply, prompt) for reply in server.ask([prompt] * 8, 24)]
    # A row fares alike in every batch, so those of the prompt are the same; each sample goes on as its own tokens do.
    assert len({trace.topk_ids.tobytes() for trace in traces}) > 1, "all samples are the same: nothing was proved"


def test_a_prompt_of_several_chunks_twice(server: Server) -> None:
    (prompt,) = make_prompts(3, [2 * sglang.CHUNK + 30])
    for hit in (0, len(prompt) - 1):
        reply = server.ask(prompt, 4)
        _check(server, reply, prompt)
        assert reply["meta_info"]["cached_tokens"] == hit


def test_turns_from_where_the_last_one_ended(server: Server) -> None:
    prompt, other = make_prompts(5, [20, 7])
    reply = server.ask(prompt, 16)
    rows = _check(server, reply, prompt).topk_ids[:-1].astype(np.int32)
    for _ in range(2):
        start = len(rows)
        prompt = [*prompt, *reply["output_ids"], *other]
        reply = server.ask(prompt, 16, routed_experts_start_len=start)
        tokens = [*prompt, *reply["output_ids"]]
        rows = np.concatenate([rows, _decode(reply["meta_info"]["routed_experts"], len(tokens), start)])
        assert server.worst(reply, prompt, [Computation(_trace(rows, tokens))]) <= EXACT


def test_a_request_that_was_retracted_ends_with_an_error(server: Server) -> None:
    prompts = make_prompts(7, [20] * 14)

    def ask(prompt: list[int]) -> Any:
        try:
            return server.ask(prompt, 100)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(ask, prompts))
    failed = [reply for reply in replies if isinstance(reply, tuple)]
    assert 0 < len(failed) < len(prompts)
    assert all(code == 500 and "it was retracted after" in said for code, said in failed)
    for prompt, reply in zip(prompts, replies, strict=True):
        # One that is asked again, as trainers do, is right.
        _check(server, server.ask(prompt, 100) if isinstance(reply, tuple) else reply, prompt)


def test_an_aborted_request_has_what_it_computed(server: Server) -> None:
    """It is aborted once its first token is there: a fixed time may be too short for that, or long enough for all."""
    (prompt,) = make_prompts(9, [20])
    reply = _stream(server, prompt, 400, abort=True)[-1]
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(reply["output_ids"]) < 400
    _check(server, reply, prompt)


def test_a_stream_ends_with_the_routes(server: Server) -> None:
    (prompt,) = make_prompts(10, [12])
    chunks = _stream(server, prompt)
    assert len(chunks) > 1
    assert [chunk for chunk in chunks if "routed_experts" in chunk["meta_info"]] == chunks[-1:]
    _check(server, chunks[-1], prompt)


def _stream(server: Server, prompt: Sequence[int], length: int = 16, *, abort: bool = False) -> list[Any]:
    """Return the chunks of a stream. abort: the request, after the first one."""
    sampling = {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
    wanted = {"return_logprob": True, "return_routed_experts": True, "stream": True, "rid": f"stream-{length}"}
    with server.open("/generate", {"input_ids": prompt, "sampling_params": sampling, **wanted}) as answer:
        text = answer.readline()
        if abort:
            server.open("/abort_request", {"rid": wanted["rid"]}).close()
        text += answer.read()
    events = [line[6:] for line in text.decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_openai_endpoints_return_the_rows(server: Server, path: str) -> None:
    (prompt,) = make_prompts(13, [20])
    body = _openai(path, prompt)
    for stream in (False, True):
        with server.open(path, {**body, "stream": stream}) as answer:
            text = answer.read().decode()
        events = [line[6:] for line in text.splitlines() if line.startswith("data: {")] if stream else [text]
        extras = [event["sglext"] for event in map(json.loads, events) if event.get("sglext")]
        rows = _decode(extras[0]["routed_experts"], len(prompt) + 16)
        # The prompt's rows are those that are cached: the same for each.
        cached = _check(server, server.ask(prompt, 1), prompt).topk_ids[: len(prompt) - 1]
        assert len(extras) == 1 and np.array_equal(rows[: len(prompt) - 1], cached)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.open(path, {**body, "n": 2})


def _openai(path: str, prompt: Sequence[int]) -> dict[str, Any]:
    text = " ".join(f"t{token}" for token in prompt)
    content = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    return {"model": "m", "max_tokens": 16, "ignore_eos": True, "return_routed_experts": True, **content}


def test_rows_of_weights_that_the_reply_does_not_name_end_with_an_error(server: Server) -> None:
    """A prompt that is cached when the weights change, and not flushed."""
    (prompt,) = make_prompts(15, [40])
    server.ask(prompt, 4)
    body = {"model_path": str(server.weights["v2"]), "weight_version": "v2", "flush_cache": False}
    assert server.post("/update_weights_from_disk", body)["success"]
    sampling = {"sampling_params": {"max_new_tokens": 4}, "return_routed_experts": True}
    assert STALE in _refused(server, "/generate", {"input_ids": prompt, **sampling})
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert STALE in _refused(server, path, _openai(path, prompt))
    last = _stream(server, prompt)[-1]["meta_info"]
    assert "routed_experts" not in last
    assert last["finish_reason"]["type"] == "abort" and STALE in last["finish_reason"]["message"]
    server.open("/flush_cache", {}).close()
    _check(server, server.ask(prompt, 8), prompt, "v2")
