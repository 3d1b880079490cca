"""One token, one route: a real server with perturbed experts and the radix cache, HF's model replaying its routes.

Wherever the engine computes a token twice (a prefix shared in a batch, retraction, pause), every output token's
log-probability must be the reference model's under the routes that come with it.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter import patching
from r3_adapter.errors import CaptureError
from r3_adapter.series import load_series
from r3_adapter.sglang.capture import computations_from_reply
from r3_adapter.sglang.computation import Computation, join_turns
from r3_adapter.sglang.cpu import cpu_environment, has_gpu
from r3_adapter.sglang.perturb import VARIABLE, Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.trace import RoutingTrace

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LAYERS, VOCAB, CHUNK, POOL = 4, 512, 256, 700
EXACT = 1e-4
TIMEOUT = 300


def _release() -> str:
    try:
        return distribution("sglang").version
    except PackageNotFoundError:
        return ""


if _release() not in [series.version for series in load_series().get("sglang", ())]:
    pytest.skip("sglang is not installed in a version with patches", allow_module_level=True)


class Reference:
    """HF's model with the weights of a checkpoint; replays a trace's routes."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import Qwen3MoeForCausalLM

        self.torch, self.trace = torch, None
        self.model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for layer in range(LAYERS):
            self.model.model.layers[layer].mlp.gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[[Any, Any, Any], Any]:
        def route(module: Any, args: Any, output: Any) -> Any:
            probs, ids = output[0].softmax(dim=-1), output[2].clone()
            ids[:-1] = self.torch.from_numpy(self.trace.topk_ids[:-1, layer].astype(np.int64))
            weights = probs.gather(1, ids)
            return output[0], weights / weights.sum(dim=-1, keepdim=True), ids

        return route

    def logprobs(self, trace: RoutingTrace) -> Any:
        """Return [S - 1] the log-probability of each token but the first."""
        self.trace = trace
        tokens = self.torch.from_numpy(trace.token_ids.astype(np.int64))[None]
        with self.torch.no_grad():
            logprobs = self.model(tokens).logits[0].log_softmax(dim=-1)
        return logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()


class Server:
    """A running server and the requests to it."""

    def __init__(self, url: str, weights: dict[str, Path]) -> None:
        self.url, self.weights = url, weights
        self.references = {name: Reference(folder) for name, folder in weights.items()}

    def open(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT)

    def post(self, path: str, body: Any) -> Any:
        with self.open(path, body) as answer:
            return json.loads(answer.read() or "null")

    def ask(self, prompts: Any, length: int | None, **options: Any) -> Any:
        sampling = {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
        wanted = {"return_logprob": True, "return_routed_experts": True, "sampling_params": sampling}
        return self.post("/generate", {"input_ids": prompts, **wanted, **options})

    def worst(self, reply: Any, prompt: Sequence[int], found: Sequence[Computation]) -> float:
        """Return the largest difference of an output token's log-probability from the reference's."""
        want = np.array([pair[0] for pair in reply["meta_info"]["output_token_logprobs"]])
        assert len(want) == len(reply["output_ids"])
        start, worst = len(prompt), [0.0]
        for computation in found:
            (version,) = computation.trace.weight_versions
            got = self.references[version].logprobs(computation.trace)
            assert (computation.sampled_start or len(prompt)) == start
            span = slice(start - len(prompt), computation.stop - len(prompt))
            worst.append(np.abs(got[start - 1 :] - want[span]).max(initial=0))
            start = computation.stop
        assert start == len(prompt) + len(want)
        return float(max(worst))

    def check(self, reply: Any, prompt: Sequence[int], **options: Any) -> list[Computation]:
        found = computations_from_reply(reply, prompt, **options)
        assert self.worst(reply, prompt, found) <= EXACT
        return found


def _write_checkpoint(folder: Path, seed: int) -> Path:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    more = {"num_hidden_layers": LAYERS, "max_position_embeddings": 1024, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(**sizes, **heads, **experts, **more, dtype=torch.float32)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def _site(folder: Path) -> Path | None:
    """Return a folder for PYTHONPATH with the patched SGLang; None if it is installed so."""
    if all(found.state is patching.State.APPLIED for found in patching.status(["sglang"])):
        return None
    installed = distribution("sglang")
    for name in sorted({file.parts[0] for file in installed.files or () if file.parts[0].startswith("sglang")}):
        shutil.copytree(Path(str(installed.locate_file(name))), folder / name, copy_function=os.symlink)
    patching.apply(["sglang"], site=folder)
    return folder


def _command(settings: EngineSettings) -> list[str]:
    command = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in settings.engine_arguments(gpu=has_gpu()).items():
        if value is None or value is False:
            continue
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return command


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    weights = {name: _write_checkpoint(folder / name, seed) for seed, name in enumerate(("v1", "v2"))}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    extra = {"host": "127.0.0.1", "port": port, "weight_version": "v1", "chunked_prefill_size": CHUNK}
    settings = EngineSettings(
        str(weights["v1"]), dtype="float32", radix_cache=True, max_total_tokens=POOL, overlap=True, extra=extra
    )
    environment = {**os.environ, **cpu_environment(), VARIABLE: str(Perturbation(1, 0.2)), "HF_HUB_OFFLINE": "1"}
    paths = [str(_site(folder / "site") or ""), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            _command(settings), env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        found = Server(f"http://127.0.0.1:{port}", weights)
        _wait_for(found, process, log)
        yield found
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert "memory leak" not in log.read_text(errors="replace")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while True:
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-4000:]
        try:
            with server.open("/health"):
                return
        except OSError:
            time.sleep(0.5)


def _prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("length", [12, 80])
def test_samples_of_one_prompt(server: Server, length: int) -> None:
    """80 tokens are long enough for SGLang to compute the prompt once, but for its last token."""
    (prompt,) = _prompts(1, [length])
    replies = server.ask([prompt] * 8, 24)
    traces = [server.check(reply, prompt)[0].trace for reply in replies]
    last = {trace.topk_ids[length - 1].tobytes() for trace in traces}
    assert len(last) > 1, "the samples computed the last prompt token alike: nothing was proved"


def test_a_prefix_of_one_token(server: Server) -> None:
    prompts = [[7, *prompt] for prompt in _prompts(2, [9, 17, 30, 5])]
    for reply, prompt in zip(server.ask(prompts, 24), prompts, strict=True):
        server.check(reply, prompt)


def test_a_prompt_of_several_chunks_twice(server: Server) -> None:
    (prompt,) = _prompts(3, [2 * CHUNK + 30])
    for hit in (0, len(prompt) - 1):
        reply = server.ask(prompt, 4)
        server.check(reply, prompt)
        assert reply["meta_info"]["cached_tokens"] == hit


def test_requests_that_want_routes_beside_ones_that_do_not(server: Server) -> None:
    (prompt,) = _prompts(4, [14])
    with ThreadPoolExecutor(8) as pool:
        wanted = [index % 2 == 0 for index in range(8)]
        replies = list(pool.map(lambda want: server.ask(prompt, 16, return_routed_experts=want), wanted))
    for reply, want in zip(replies, wanted, strict=True):
        if want:
            server.check(reply, prompt)
        else:
            assert "routed_experts" not in reply["meta_info"]


def test_turns_from_where_the_last_one_ended(server: Server) -> None:
    prompt, other = _prompts(5, [20, 7])
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
    prompt, other = _prompts(6, [20, 7])
    (first,) = server.check(server.ask(prompt, 16), prompt)
    server.open("/flush_cache", {}).close()
    tokens = [*first.trace.token_ids.tolist(), *other]
    reply = server.ask(tokens, 16, routed_experts_start_len=first.stop - 1)
    (turn,) = computations_from_reply(reply, tokens, start=first.stop - 1)
    with pytest.raises(CaptureError, match=r"turn: computed upon row .* != .*, the last of the turn before"):
        join_turns(first, turn)
    server.check(server.ask(tokens, 16), tokens)


def test_a_pool_that_is_too_small(server: Server) -> None:
    prompts = _prompts(7, [20] * 14)
    replies = server.ask(prompts, 100)
    found = [server.check(reply, prompt) for reply, prompt in zip(replies, prompts, strict=True)]
    retracted = sum(reply["meta_info"]["num_retractions"] > 0 for reply in replies)
    assert retracted > 0
    assert sum(len(computations) > 1 for computations in found) == retracted


def _update_while_running(server: Server, mode: str) -> list[tuple[list[int], Any]]:
    """Change the weights to v2 while requests run, and back to v1 when they are done."""
    prompts = _prompts(8, [10, 20, 30, 40])
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.ask, prompt, 120) for prompt in prompts]
        time.sleep(0.5)
        server.post("/pause_generation", {"mode": mode})
        # SGLang cannot flush the cache while requests wait.
        _load(server, "v2", flush=False)
        server.post("/continue_generation", {})
        replies = [future.result() for future in asked]
    _load(server, "v1", flush=True)
    return list(zip(prompts, replies, strict=True))


def _load(server: Server, version: str, *, flush: bool) -> None:
    body = {"model_path": str(server.weights[version]), "weight_version": version, "flush_cache": flush}
    assert server.post("/update_weights_from_disk", body)["success"]


def _names(computation: Computation, rows: slice) -> set[str]:
    trace = computation.trace
    return {trace.weight_versions[index] for index in trace.version_ids[:-1][rows]}


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
        assert _names(after, slice(len(prompt), None)) == {"v2"}
        assert after.sampled_start == before.stop
    assert computed_twice > 0


def test_weights_change_while_requests_wait_in_place(server: Server) -> None:
    changed = 0
    for prompt, reply in _update_while_running(server, "in_place"):
        (computation,) = computations_from_reply(reply, prompt)
        spans = reply["meta_info"].get("weight_versions", [])
        if len(spans) < 2:
            continue
        changed += 1
        # The span's first token was sampled by the row before it, which may have been under way when it changed:
        # rows have the version of their launch, spans that of their result.
        first = len(prompt) - 1 + spans[1]["start"]
        assert _names(computation, slice(0, first)) == {"v1"}
        assert _names(computation, slice(first + 1, None)) == {"v2"}
    assert changed > 0


def test_many_requests_and_aborts(server: Server) -> None:
    rng = random.Random(0)
    prompts = _prompts(9, [rng.randrange(3, 40) for _ in range(60)])
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
    (prompt,) = _prompts(10, [12])
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
    (prompt,) = _prompts(11, [13])
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.ask(prompt, 4, routed_experts_start_len=start)
    assert refused.value.code == 400
    assert message in refused.value.read().decode()
    server.check(server.ask(prompt, 4), prompt)
