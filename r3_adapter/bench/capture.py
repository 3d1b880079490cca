"""`r3 bench capture`: what capture costs in a real engine: time, bytes on each transport, host memory.

Three engines, capture off, SGLang's own and the patched one, take turns in one run on a model whose routes are large
against its arithmetic. `python -m r3_adapter.bench.capture FOLDER NAME` is one of the engines.
"""

import base64
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from r3_adapter.errors import R3Error
from r3_adapter.sglang.capture import payload_of, trace_from_reply
from r3_adapter.sglang.cpu import cpu_environment
from r3_adapter.sglang.engine import Engine, native_bytes
from r3_adapter.sglang.facts import ModelFacts
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.sglang.shared import fetch_payload
from r3_adapter.tiny import TinyModel, write_checkpoint
from r3_adapter.watchdog import MEMORY

MODEL = TinyModel(num_layers=48, num_experts=128, topk=8, hidden_size=16)
SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 192, 16
SLOTS = 8192
LONG = 8192
WARM_UP = 1
_MARK = "r3-bench:"
_EXTRA: Mapping[str, Mapping[str, Any]] = {
    # The engines wait for their turn in one machine.
    "off": {"sleep_on_idle": True, "enable_return_routed_experts": False},
    "native": {"sleep_on_idle": True},
    "patched": {"sleep_on_idle": True},
}


def bench_capture(
    *, pairs: int = 9, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Generate the same tokens with each engine in turn; return medians of paired ratios, and bytes.

    patched_over_native, patched_over_off: tokens a second of the patched engine over the other's.
    bytes_per_token_*: of a reply, as they travel. SGLang's own form is base64 text on every transport.
    host_bytes_*: of the buffers of a rank that sends replies, for 8,192 KV slots.
    payload_over_native_gather: seconds to make the payload of an 8,192-token request over those of SGLang's gather.
    seconds_shared_memory: to hand 1,000 payloads of 2,000 tokens over in shared memory, up to checked traces.

    Raises:
        R3Error: An engine does not start or fails, or fewer than two pairs.
    """
    if pairs < 2:
        raise R3Error(f"pairs ({pairs}) < 2")
    with tempfile.TemporaryDirectory() as path, ExitStack() as stack:
        folder = Path(path)
        write_checkpoint(folder / "model", dtype="float32", seed=seed, shape=MODEL)
        engines = {engine: stack.enter_context(_Child(folder, engine)) for engine in _EXTRA}
        for engine in engines.values():
            engine.wait_until_started()
        found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for turn in range(WARM_UP + pairs):
            # The order turns over, so that a drift of the machine cancels.
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                found[name].append(engines[name].ask("generate"))
            progress(turn + 1, WARM_UP + pairs)
        payload = engines["patched"].ask("payload") | engines["patched"].ask("shared")
    return _summary({name: runs[WARM_UP:] for name, runs in found.items()}, payload)


def _summary(found: Mapping[str, list[dict[str, float]]], payload: Mapping[str, float]) -> dict[str, Any]:
    seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    ratios = {
        name: [other / own for own, other in zip(seconds["patched"], seconds[name], strict=True)]
        for name in ("native", "off")
    }
    facts = ModelFacts(MODEL.num_experts, MODEL.topk, tuple(range(MODEL.num_layers)), MODEL.num_layers)
    row = MODEL.num_layers * MODEL.topk
    return {
        "patched_over_native": statistics.median(ratios["native"]),
        "patched_over_native_quartiles": statistics.quantiles(ratios["native"], n=4)[::2],
        "patched_over_off": statistics.median(ratios["off"]),
        "patched_over_off_quartiles": statistics.quantiles(ratios["off"], n=4)[::2],
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "bytes_per_token_native": found["native"][0]["bytes_per_token_http"],
        "bytes_per_token_http": found["patched"][0]["bytes_per_token_http"],
        "bytes_per_token_engine": found["patched"][0]["bytes_per_token_engine"],
        "host_bytes_native": native_bytes(SLOTS + 1, facts),
        # Ids of a byte, a version of four, and two row numbers of eight.
        "host_bytes_patched": SLOTS * (row + 4 + 16),
        **payload,
        "pairs": len(seconds["patched"]),
        "tokens": SAMPLES * (PROMPT_TOKENS + RESPONSE_TOKENS),
        "model": asdict(MODEL),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "sglang")},
    }


class _Child:
    """An engine in a process of its own, which answers on its standard output."""

    def __init__(self, folder: Path, name: str) -> None:
        self._command = [sys.executable, "-m", "r3_adapter.bench.capture", str(folder), name]
        self._log = folder / f"{name}.log"

    def __enter__(self) -> "_Child":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **cpu_environment()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_until_started(self) -> None:
        self._answer()

    def ask(self, question: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                answer: dict[str, float] = json.loads(line.removeprefix(_MARK))
                return answer
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-4000:]
        raise R3Error(f"{' '.join(self._command)}: ended\n{tail}")


def _serve(folder: Path, name: str) -> None:
    """Start an engine, and do what the lines of standard input ask for."""
    settings = EngineSettings(
        str(folder / "model"),
        dtype="float32",
        routed_experts_format="safetensors" if name == "patched" else "flat",
        max_total_tokens=SLOTS,
        max_running_requests=16,
        extra=_EXTRA[name],
    )
    with Engine(settings) as engine:
        print(f"{_MARK}{{}}", flush=True)
        questions = {"generate": lambda: _generate(engine, name), "payload": _payload, "shared": _shared}
        for line in sys.stdin:
            answer = questions[line.strip()]()
            print(f"{_MARK}{json.dumps(answer)}", flush=True)


def _generate(engine: Engine, name: str) -> dict[str, float]:
    """Generate one batch; the time is until the replies are there, with the bytes of their routes."""
    prompts = np.random.default_rng(0).integers(3, MODEL.vocab_size, (SAMPLES, PROMPT_TOKENS)).tolist()
    params = {"temperature": 0.0, "max_new_tokens": RESPONSE_TOKENS, "ignore_eos": True}
    start = time.perf_counter()
    replies = engine.replies(prompts, params, routes=name != "off")
    found: dict[str, float] = {"seconds": time.perf_counter() - start}
    if name == "off":
        return found
    payload, num_tokens = payload_of(replies[0], name), PROMPT_TOKENS + RESPONSE_TOKENS
    if name == "patched":
        assert trace_from_reply(replies[0], prompts[0], facts=engine.facts).num_tokens == num_tokens
    else:
        assert engine.facts is not None
        assert len(payload) == native_bytes(num_tokens, engine.facts)
    found["bytes_per_token_engine"] = len(payload) / num_tokens
    found["bytes_per_token_http"] = len(base64.b64encode(payload)) / num_tokens
    return found


def _payload(rounds: int = 30) -> dict[str, float]:
    """Time the payload of a long request against SGLang's gather of the same rows."""
    from sglang.srt.state_capturer.base import BaseTopkCapturer
    from sglang.srt.state_capturer.routed_experts_safetensors import routed_experts_to_safetensors

    patched, native, pool = _captured(LONG)
    tokens, seconds = array("q", [7] * LONG), dict[str, list[float]](patched=[], native=[])
    makers: dict[str, Callable[[], object]] = {
        "patched": lambda: routed_experts_to_safetensors(patched, 0, tokens, pool),
        "native": lambda: BaseTopkCapturer.get_topk(native, 0, LONG, pool),
    }
    for _ in range(rounds):
        for name, make in makers.items():
            start = time.perf_counter()
            make()
            seconds[name].append(time.perf_counter() - start)
    ratios = [own / other for own, other in zip(seconds["patched"], seconds["native"], strict=True)]
    return {
        "payload_over_native_gather": statistics.median(ratios),
        "seconds_payload": statistics.median(seconds["patched"]),
        "seconds_native_gather": statistics.median(seconds["native"]),
    }


def _shared(requests: int = 1000, num_tokens: int = 2000) -> dict[str, float]:
    """Time the way of captured rows through shared memory: payload, file, mapping, a trace that is checked and kept."""
    from sglang.srt.state_capturer.routed_experts_files import PayloadFolder
    from sglang.srt.state_capturer.routed_experts_safetensors import routed_experts_to_safetensors

    patched, _, pool = _captured(num_tokens)
    tokens = array("q", [i % MODEL.vocab_size for i in range(num_tokens)])
    info, num_bytes = {"finish_reason": {"type": "length"}}, 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        folder, traces = PayloadFolder(path), []
        start = time.perf_counter()
        for _ in range(requests):
            payload = routed_experts_to_safetensors(patched, 0, tokens, pool)
            num_bytes += payload.numel()
            handle = folder.put(payload).numpy().tobytes()
            reply = {"output_ids": list(tokens[-1:]), "meta_info": {**info, "routed_experts": handle}}
            traces.append(trace_from_reply(fetch_payload(reply, Path(path), "reply"), tokens[:-1]))
        seconds = time.perf_counter() - start
        assert len({trace.digest() for trace in (traces[0], traces[-1])}) == 1
    return {"seconds_shared_memory": seconds, "bytes_shared_memory": num_bytes}


def _captured(num_tokens: int) -> tuple[Any, Any, Any]:
    """Return the patched capturer and SGLang's own after a request whose rows lie anywhere, and its pool."""
    import torch
    from sglang.srt.state_capturer.routed_experts_links import ROOT, RowLinks

    num_slots = 2 * num_tokens
    locs, links = torch.randperm(num_slots)[: num_tokens - 1], RowLinks(num_slots)
    links.write(locs, torch.cat([torch.tensor([ROOT]), locs[:-1]]))
    # An odd step makes the ids of a row distinct.
    first, step = torch.randint(MODEL.num_experts, (2, num_slots, MODEL.num_layers, 1))
    rows = (first + (2 * step + 1) * torch.arange(MODEL.topk)) % MODEL.num_experts
    patched, native = (
        SimpleNamespace(host_cache=SimpleNamespace(buffer=rows.to(dtype)), links=links)
        for dtype in (torch.uint8, torch.int32)
    )
    patched.version_ids, patched.version_index = torch.zeros(num_slots, dtype=torch.int32), {"default": 0}
    patched.layer_ids, patched.num_experts = list(range(MODEL.num_layers)), MODEL.num_experts
    patched.model_shape = {name: getattr(MODEL, name) for name in ("num_layers", "hidden_size", "vocab_size")}
    return patched, native, SimpleNamespace(req_to_token=torch.cat([locs, locs[:1]]).int()[None])


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
