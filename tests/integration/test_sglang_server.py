"""One token, one route: a real server with perturbed experts and the radix cache, HF's model replaying its routes.

Wherever the engine computes a token twice (a prefix shared in a batch, retraction, pause), every output token's
log-probability must be the reference model's under the routes that come with it.
"""

import base64
import importlib.util
import json
import os
import random
import re
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.capture import computations_from_reply
from r3_adapter.sglang.computation import Computation, join_turns, read_computations
from r3_adapter.sglang.openai import events_of, sample_of_openai

SPEC = importlib.util.spec_from_file_location("sglang_server", Path(__file__).with_name("sglang_server.py"))
sglang = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang)
EXACT, Server, make_prompts = sglang.EXACT, sglang.Server, sglang.make_prompts

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=[1, 2], ids=lambda stages: f"pp{stages}")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param > (os.cpu_count() or 1) and not sglang.has_gpu():
        pytest.skip("needs a core for each pipeline stage")
    with sglang.serve_strained(tmp_path_factory.mktemp("server"), pp_size=request.param) as found:
        yield found


@pytest.mark.parametrize("length", [12, 80])
def test_samples_of_one_prompt(server: Server, length: int) -> None:
    """80 tokens are long enough for SGLang to compute the prompt once, but for its last token."""
    (prompt,) = make_prompts(1, [length])
    replies = server.ask([prompt] * 8, 24)
    traces = [server.check(reply, prompt)[0].trace for reply in replies]
    # A row fares alike in every batch, so those of the prompt are the same; each sample goes on as its own tokens do.
    assert len({trace.topk_ids.tobytes() for trace in traces}) > 1, "all samples are the same: nothing was proved"


@pytest.mark.parametrize("length", [12, 80])
def test_the_prompt_of_a_group_is_sent_once(server: Server, length: int) -> None:
    (prompt,) = make_prompts(15, [length])
    (head,) = computations_from_reply(server.ask(prompt, 0), prompt)
    for reply in server.ask([prompt] * 8, 24, routed_experts_start_len=length - 1):
        (turn,) = computations_from_reply(reply, prompt, start=length - 1)
        assert turn.trace.num_tokens == 1 + 24
        whole = join_turns(head, turn)
        assert whole.trace.captured[:-1].all()
        assert server.worst(reply, prompt, [whole]) <= EXACT


def test_a_prefix_of_one_token(server: Server) -> None:
    prompts = [[7, *prompt] for prompt in make_prompts(2, [9, 17, 30, 5])]
    for reply, prompt in zip(server.ask(prompts, 24), prompts, strict=True):
        server.check(reply, prompt)


def test_a_prompt_of_several_chunks_twice(server: Server) -> None:
    (prompt,) = make_prompts(3, [2 * sglang.CHUNK + 30])
    for hit in (0, len(prompt) - 1):
        reply = server.ask(prompt, 4)
        server.check(reply, prompt)
        assert reply["meta_info"]["cached_tokens"] == hit


def test_requests_that_want_routes_beside_ones_that_do_not(server: Server) -> None:
    (prompt,) = make_prompts(4, [14])
    with ThreadPoolExecutor(8) as pool:
        wanted = [index % 2 == 0 for index in range(8)]
        replies = list(pool.map(lambda want: server.ask(prompt, 16, return_routed_experts=want), wanted))
    for reply, want in zip(replies, wanted, strict=True):
        if want:
            server.check(reply, prompt)
        else:
            assert "routed_experts" not in reply["meta_info"]


def test_turns_from_where_the_last_one_ended(server: Server) -> None:
    prompt, other = make_prompts(5, [20, 7])
    reply = server.ask(prompt, 16)
    (conversation,) = server.check(reply, prompt)
    for _ in range(2):
        start = conversation.stop - 1
        tokens = [*conversation.trace.token_ids.tolist(), *other]
        reply = server.ask(tokens, 16, routed_experts_start_len=start)
        # Overlap scheduling has also fed the last token forward.
        assert reply["meta_info"]["cached_tokens"] in (start, start + 1)
        (turn,) = computations_from_reply(reply, tokens, start=start)
        assert turn.trace.num_tokens == 1 + len(other) + 16
        conversation = join_turns(conversation, turn)
        assert conversation.trace.captured[:-1].all()
        assert server.worst(reply, tokens, [conversation]) <= EXACT


def test_a_turn_that_was_computed_upon_other_rows_is_refused(server: Server) -> None:
    prompt, other = make_prompts(6, [20, 7])
    (first,) = server.check(server.ask(prompt, 16), prompt)
    server.open("/flush_cache", {}).close()
    tokens = [*first.trace.token_ids.tolist(), *other]
    reply = server.ask(tokens, 16, routed_experts_start_len=first.stop - 1)
    (turn,) = computations_from_reply(reply, tokens, start=first.stop - 1)
    with pytest.raises(CaptureError, match=r"turn: follows row .* != .*, the last row of the turn before"):
        join_turns(first, turn)
    server.check(server.ask(tokens, 16), tokens)


def test_a_pool_that_is_too_small(server: Server) -> None:
    prompts = make_prompts(7, [20] * 14)
    replies = server.ask(prompts, 100)
    found = [server.check(reply, prompt) for reply, prompt in zip(replies, prompts, strict=True)]
    retracted = sum(reply["meta_info"]["num_retractions"] > 0 for reply in replies)
    assert retracted > 0
    assert sum(len(computations) > 1 for computations in found) == retracted


def _update_while_running(server: Server, mode: str) -> list[tuple[list[int], Any]]:
    """Change the weights to v2 while requests run, and back to v1 when they are done."""
    prompts = make_prompts(8, [10, 20, 30, 40])
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.ask, prompt, 120) for prompt in prompts]
        time.sleep(0.5)
        server.post("/pause_generation", {"mode": mode})
        # SGLang cannot flush the cache while requests wait.
        _load(server, "v2")
        server.post("/continue_generation", {})
        replies = [future.result() for future in asked]
    _load_first(server)
    return list(zip(prompts, replies, strict=True))


def _load(server: Server, version: str, **options: Any) -> None:
    body = {"model_path": str(server.weights[version]), "weight_version": version, "flush_cache": False}
    assert server.post("/update_weights_from_disk", {**body, **options})["success"]


def _load_first(server: Server) -> None:
    """Load v1 again, and flush the cache, as SGLang can when the last pass of a request that replied is done too."""
    _load(server, "v1")
    end = time.monotonic() + sglang.TIMEOUT
    while time.monotonic() < end:
        with suppress(urllib.error.HTTPError), server.open("/flush_cache", {}):
            return
        time.sleep(0.2)
    raise AssertionError("the cache cannot be flushed")


def _names(computation: Computation, rows: slice) -> set[str]:
    trace = computation.trace
    return {sglang.base_name(trace.weight_versions[index]) for index in trace.version_ids[:-1][rows]}


def test_weights_change_while_requests_are_retracted(server: Server) -> None:
    computed_twice = 0
    for prompt, reply in _update_while_running(server, "retract"):
        found = computations_from_reply(reply, prompt)
        if len(found) == 1:
            continue
        computed_twice += 1
        before, after = found
        # Its outputs' log-probabilities are of the weights and routes from before.
        old = {**reply, "output_ids": reply["output_ids"][: before.stop - len(prompt)]}
        pairs = reply["meta_info"]["output_token_logprobs"][: before.stop - len(prompt)]
        old["meta_info"] = {**reply["meta_info"], "output_token_logprobs": pairs}
        assert server.worst(old, prompt, [before]) <= EXACT
        assert _names(before, slice(None)) == {"v1"}
        # The prompt's cached rows are of the old weights, and say so; the outputs were computed again.
        assert _names(after, slice(0, len(prompt))) == {"v1"}
        names = [sglang.base_name(after.trace.weight_versions[index]) for index in after.trace.version_ids[:-1]]
        assert names == sorted(names)
        assert set(names[len(prompt) :]) == {"v2"} or not server.pauses
        assert after.sampled_start == before.stop
    assert computed_twice > 0 or not server.pauses


def test_weights_change_while_requests_wait_in_place(server: Server) -> None:
    changed = 0
    for prompt, reply in _update_while_running(server, "in_place"):
        (computation,) = computations_from_reply(reply, prompt)
        spans = reply["meta_info"].get("weight_versions", [])
        if not sglang.part("utils/weight_versions.py").exists():
            # Its replies tell no spans of tokens: the rows' own names are all there is.
            versions = computation.trace.version_ids[:-1]
            assert np.all(np.diff(versions) >= 0)
            changed += len(set(versions.tolist())) == 2 and _names(computation, slice(None)) == {"v1", "v2"}
            continue
        if len(spans) < 2:
            continue
        changed += 1
        # The span's first token was sampled by the row before it, which may have been under way when it changed:
        # rows have the version of their launch, spans that of their result.
        first = len(prompt) - 1 + spans[1]["start"]
        assert _names(computation, slice(0, first)) == {"v1"}
        assert _names(computation, slice(first + 1, None)) == {"v2"}
    assert changed > 0


def test_weights_that_change_without_a_new_name_get_one(server: Server) -> None:
    (prompt,) = make_prompts(13, [40])
    known = set(server.check(server.ask(prompt, 8), prompt)[0].trace.weight_versions)
    with server.open("/model_info") as answer:
        current = json.load(answer)["weight_version"]
    for asked in (None, "v1", current, None):
        _load(server, "v2", weight_version=asked)
        reply = server.ask(prompt, 8)
        (computation,) = computations_from_reply(reply, prompt)
        trace = computation.trace
        names = [trace.weight_versions[index] for index in trace.version_ids[:-1]]
        # The prompt's cached rows are of the weights before, and say so.
        old, new = set(names[: len(prompt) - 1]), set(names[len(prompt) - 1 :])
        assert old <= known and len(new) == 1 and not new & known
        known |= new
        with server.open("/model_info") as answer:
            assert {json.load(answer)["weight_version"], reply["meta_info"]["weight_version"]} == new
    _load_first(server)
    server.check(server.ask(prompt, 8), prompt)


def test_weights_that_change_without_a_name_under_a_request(server: Server) -> None:
    (prompt,) = make_prompts(14, [20])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, prompt, 200)
        time.sleep(0.5)
        server.post("/pause_generation", {"mode": "in_place"})
        _load(server, "v2", weight_version=None)
        server.post("/continue_generation", {})
        (computation,) = computations_from_reply(asked.result(), prompt)
    _load_first(server)
    version_ids = computation.trace.version_ids[:-1]
    assert len(computation.trace.weight_versions) == 2 and np.all(np.diff(version_ids) >= 0)


def test_an_update_in_several_requests_has_the_name_that_it_was_given(server: Server) -> None:
    (prompt,) = make_prompts(15, [20])
    for want in ("step-7", r"step-7#\d+"):
        for _ in range(3):
            _load(server, "v1", weight_version="step-7")
        (computation,) = computations_from_reply(server.ask(prompt, 4), prompt)
        # The prompt's cached rows are of the weights before.
        assert re.fullmatch(want, computation.trace.weight_versions[-1])
    body, want = {"new_version": "step-8", "abort_all_requests": False}, "step-8"
    if sglang.part("utils/weight_versions.py").exists():
        server.post("/update_weight_version", body)
    else:
        # Its schedulers would not hear of the name.
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.post("/update_weight_version", body)
        want = computation.trace.weight_versions[-1]
    assert computations_from_reply(server.ask(prompt, 4), prompt)[0].trace.weight_versions[-1] == want
    _load_first(server)


def test_many_requests_and_aborts(server: Server) -> None:
    rng = random.Random(0)
    prompts = make_prompts(9, [rng.randrange(3, 40) for _ in range(60)])
    prompts += [prompt + prompts[0] for prompt in prompts]
    doomed = rng.sample(range(len(prompts)), 40)
    with ThreadPoolExecutor(len(prompts)) as pool:
        ask = [pool.submit(server.ask, prompt, 24, rid=f"many-{at}-") for at, prompt in enumerate(prompts)]
        for at in doomed:
            time.sleep(0.05)
            server.open("/abort_request", {"rid": f"many-{at}-"}).close()
        replies = [future.result() for future in ask]
    aborted = 0
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply["meta_info"]["finish_reason"]["type"] != "abort":
            server.check(reply, prompt)
        elif "routed_experts" in reply["meta_info"]:
            # It was running: what it computed until then is returned.
            server.check(reply, prompt, aborted="keep")
            aborted += 1
        else:
            assert reply["output_ids"] == []
    assert aborted > 0
    # Only an engine that holds nothing for nobody flushes its cache.
    with server.open("/flush_cache", {}) as answer:
        assert answer.status == 200


def test_a_stream_ends_with_the_routes(server: Server) -> None:
    (prompt,) = make_prompts(10, [12])
    sampling = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
    wanted = {"return_logprob": True, "return_routed_experts": True, "stream": True}
    with server.open("/generate", {"input_ids": prompt, "sampling_params": sampling, **wanted}) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len(chunks) > 1
    assert not any("routed_experts" in chunk["meta_info"] for chunk in chunks[:-1])
    server.check(chunks[-1], prompt)


@pytest.mark.parametrize(("start", "message"), [(-1, "lower than 0"), (14, "higher than the number of input tokens")])
def test_a_start_outside_the_prompt_is_refused(server: Server, start: int, message: str) -> None:
    (prompt,) = make_prompts(11, [13])
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.ask(prompt, 4, routed_experts_start_len=start)
    assert refused.value.code == 400
    assert message in refused.value.read().decode()
    server.check(server.ask(prompt, 4), prompt)


def test_a_request_that_is_aborted_while_it_waits_after_a_retraction(server: Server) -> None:
    (prompt,) = make_prompts(12, [30])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, prompt, 400, rid="retracted-")
        time.sleep(1)
        server.post("/pause_generation", {"mode": "retract"})
        server.open("/abort_request", {"rid": "retracted-"}).close()
        reply = asked.result()
    server.post("/continue_generation", {})
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(reply["output_ids"]) < 400
    *earlier, computation = server.check(reply, prompt, aborted="keep")
    assert not (earlier and server.pauses)
    assert computation.stop == len(prompt) + len(reply["output_ids"])


def _ask_as_openai(server: Server, path: str, prompt: list[int], **options: Any) -> Any:
    """Ask for 16 tokens in words."""
    text = " ".join(f"t{token}" for token in prompt)
    content = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    body = {"model": "m", "max_tokens": 16, "ignore_eos": True, "return_routed_experts": True, **content, **options}
    # Chat streams leave out the log-probability of a token that adds no text.
    return server.open(path, {**body, "skip_special_tokens": False})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_openai_endpoints_return_the_payload(server: Server, path: str, stream: bool) -> None:
    (prompt,) = make_prompts(13, [20])
    chat = "chat" in path
    logprobs = {"logprobs": True} if chat else {"logprobs": 1}
    with _ask_as_openai(server, path, prompt, stream=stream, **logprobs) as answer:
        text = answer.read().decode()
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")] if stream else [text]
    found, payloads = [], []
    for event in map(json.loads, events):
        payloads += [extra["routed_experts"]] if (extra := event.get("sglext")) else []
        for choice in event["choices"]:
            if part := choice.get("logprobs"):
                found += [pair["logprob"] for pair in part["content"]] if chat else part["token_logprobs"]
    (payload,) = payloads
    (computation,) = read_computations(base64.b64decode(payload))
    trace = computation.trace
    assert trace.token_ids[: len(prompt)].tolist() == prompt
    assert trace.num_tokens == len(prompt) + 16 == len(prompt) + len(found)
    want = server.references["v1"].logprobs(trace)[len(prompt) - 1 :]
    np.testing.assert_allclose(found, want, atol=EXACT, rtol=0)
    request = {"temperature": 1.0, "repetition_penalty": 1.0, **logprobs}
    sample = sample_of_openai(events_of(text) if stream else json.loads(text), request, prompt_ids=prompt)
    assert sample.trace == trace and sample.num_prompt_tokens == len(prompt)
    np.testing.assert_array_equal(sample.logprobs, np.array(found, np.float32))
    if not stream:
        assert sample_of_openai(json.loads(text), request).num_prompt_tokens == len(prompt)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_routes_of_several_choices_are_refused(server: Server, path: str) -> None:
    (prompt,) = make_prompts(14, [9])
    with pytest.raises(urllib.error.HTTPError) as refused:
        _ask_as_openai(server, path, prompt, n=2)
    assert refused.value.code == 400
    assert "return_routed_experts with 2 choices" in refused.value.read().decode()
    server.check(server.ask(prompt, 4), prompt)
