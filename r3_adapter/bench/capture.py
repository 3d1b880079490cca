"""`r3 bench capture`: what capture costs in a real engine: time, bytes on each transport, host memory.

Three engines, capture off, SGLang's own and the patched one, take turns in one run: on a model whose routes are large
against its arithmetic, or on the shape of a real one with random weights. `python -m r3_adapter.bench.capture FOLDER
NAME` is one of the engines.
"""

import asyncio
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
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from r3_adapter.bench.payloads import time_payload, time_shared_memory
from r3_adapter.errors import R3Error, check_choice
from r3_adapter.model_shapes import SHAPES
from r3_adapter.proof.tiny import TinyModel, write_checkpoint
from r3_adapter.sglang.capture import payload_of, trace_from_reply
from r3_adapter.sglang.cpu import cpu_environment, has_gpu
from r3_adapter.sglang.engine import Engine, native_bytes
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.settings import EngineSettings

MODEL = TinyModel(num_layers=48, num_experts=128, topk=8, hidden_size=16)
WARM_UP = 1
_MARK = "r3-bench:"
_ENGINES: Mapping[str, Mapping[str, Any]] = {
    "off": {"enable_return_routed_experts": False},
    "native": {},
    "patched": {},
}
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class _Load:
    """What each engine is asked, in tokens. Dummy weights are random ones that the engine makes itself."""

    samples: int = 16
    prompt: int = 192
    response: int = 16
    dtype: str = "float32"
    slots: int = 8192
    extra: Mapping[str, Any] | None = None

    @classmethod
    def of_shape(cls, device: Device, extra: Mapping[str, Any]) -> "_Load":
        dummy = {"load_format": "dummy", **extra}
        if device == "cpu":
            # A rehearsal: all steps, at a size that two cores compute.
            return cls(samples=4, prompt=64, response=8, dtype="bfloat16", slots=512, extra=dummy)
        return cls(samples=64, prompt=1024, response=192, dtype="bfloat16", slots=64 * 1232, extra=dummy)


def bench_capture(
    *,
    pairs: int = 9,
    seed: int = 0,
    shape: str | None = None,
    num_layers: int = 12,
    device: Device = "cpu",
    extra: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Generate the same tokens with each engine in turn; return medians of paired ratios, and bytes.

    patched_over_native, patched_over_off: tokens a second of the patched engine over the other's.
    prefill_over_off: seconds for one token of each prompt. itl_p99_over_off: between tokens of a stream, its slowest.
    native_*: the same of SGLang's own capture.
    scheduler_ms_per_request_*, blocked_ms_p99, finalize_ms: see bench/scheduler.py; with `num_layers` of a shape.
    bytes_per_token_*: of a reply, as they travel. SGLang's own form is base64 text on every transport.
    host_bytes_*: of the buffers of a rank that sends replies, for 8,192 KV slots.
    payload_over_native_gather: seconds to make the payload of an 8,192-token request over those of SGLang's gather.
    seconds_shared_memory: to hand 1,000 payloads of 2,000 tokens over in shared memory, up to checked traces.

    shape, num_layers, device, extra: a shape of `SHAPES` in place of the small model, and more arguments of SGLang.
    The three engines are there at once: on a GPU of 80 GB 12 layers of qwen3-30b-a3b fit.

    Raises:
        R3Error: An engine does not start or fails, fewer than two pairs, a shape or device that is not there.
    """
    if pairs < 2:
        raise R3Error(f"pairs ({pairs}) < 2")
    check_choice("device", device, Device)
    if (device == "cuda") != has_gpu():
        raise R3Error(f"device {device!r} != {'cuda' if has_gpu() else 'cpu'}, which this machine has")
    if shape is None and (device == "cuda" or extra):
        raise R3Error("device 'cuda' and arguments of SGLang need a shape: the small model runs on a CPU only")
    if shape is not None and shape not in SHAPES:
        raise R3Error(f"shape {shape!r} is none of {', '.join(map(repr, SHAPES))}")
    with tempfile.TemporaryDirectory() as path, ExitStack() as stack:
        folder = Path(path)
        load = _write_model(folder, shape, num_layers, seed, device, extra or {})
        (folder / "load.json").write_text(json.dumps(asdict(load)), encoding="utf-8")
        engines = {name: stack.enter_context(_Child(folder, name)) for name in _ENGINES}
        for engine in engines.values():
            engine.wait_until_started()
        found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for turn in range(WARM_UP + pairs):
            # The order turns over, so that a drift of the machine cancels.
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                found[name].append(engines[name].ask("generate") | engines[name].ask("prefill"))
                found[name][-1] |= engines[name].ask("stream")
            progress(turn + 1, WARM_UP + pairs)
        payload = engines["patched"].ask("payload") | engines["patched"].ask("shared") if shape is None else {}
    payload |= _scheduler(MODEL.num_layers if shape is None else num_layers)
    return _summary({name: runs[WARM_UP:] for name, runs in found.items()}, payload, load, shape, num_layers)


def _write_model(
    folder: Path, shape: str | None, num_layers: int, seed: int, device: Device, extra: Mapping[str, Any]
) -> _Load:
    if shape is None:
        write_checkpoint(folder / "model", dtype="float32", seed=seed, shape=MODEL)
        return _Load()
    (folder / "model").mkdir()
    config = {**SHAPES[shape], "num_hidden_layers": num_layers, "architectures": ["Qwen3MoeForCausalLM"]}
    (folder / "model/config.json").write_text(json.dumps(config), encoding="utf-8")
    return _Load.of_shape(device, extra)


def _scheduler(num_layers: int) -> dict[str, float]:
    """Run bench/scheduler.py in a process of its own: it takes the place of an engine."""
    command = [sys.executable, "-m", "r3_adapter.bench.scheduler", str(num_layers)]
    environment = {**os.environ, **cpu_environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise R3Error(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _ratios(found: Mapping[str, list[dict[str, float]]], name: str, other: str, key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(found[name], found[other], strict=True)]


def _summary(
    found: Mapping[str, list[dict[str, float]]],
    payload: Mapping[str, float],
    load: _Load,
    shape: str | None,
    num_layers: int,
) -> dict[str, Any]:
    over = {name: _ratios(found, name, "patched", "seconds") for name in ("native", "off")}
    figures = {
        "patched_over_native": statistics.median(over["native"]),
        "patched_over_native_quartiles": statistics.quantiles(over["native"], n=4)[::2],
        "patched_over_off": statistics.median(over["off"]),
        "patched_over_off_quartiles": statistics.quantiles(over["off"], n=4)[::2],
    }
    for prefix, name in (("", "patched"), ("native_", "native")):
        for what, key in (("prefill", "prefill"), ("itl_p99", "itl_p99")):
            figures[f"{prefix}{what}_over_off"] = statistics.median(_ratios(found, name, "off", key))
    figures |= {
        "seconds": {name: statistics.median([run["seconds"] for run in runs]) for name, runs in found.items()},
        "bytes_per_token_native": found["native"][0]["bytes_per_token_http"],
        "bytes_per_token_http": found["patched"][0]["bytes_per_token_http"],
        "bytes_per_token_engine": found["patched"][0]["bytes_per_token_engine"],
        **payload,
        "pairs": len(over["off"]),
        "tokens": load.samples * (load.prompt + load.response),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "sglang")},
    }
    if shape is not None:
        return figures | {"shape": shape, "num_layers": num_layers}
    moe = MoEConfig(MODEL.num_experts, MODEL.topk, tuple(range(MODEL.num_layers)), MODEL.num_layers)
    return figures | {
        "host_bytes_native": native_bytes(load.slots + 1, moe),
        # Ids of a byte, a version of four, and two row numbers of eight.
        "host_bytes_patched": load.slots * (MODEL.num_layers * MODEL.topk + 4 + 16),
        "model": asdict(MODEL),
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
    load = _Load(**json.loads((folder / "load.json").read_text(encoding="utf-8")))
    settings = EngineSettings(
        str(folder / "model"),
        dtype=load.dtype,
        routed_experts_format="safetensors" if name == "patched" else "flat",
        max_total_tokens=load.slots,
        max_running_requests=load.samples,
        # The engines wait for their turn in one machine.
        extra={"sleep_on_idle": True, **(load.extra or {}), **_ENGINES[name]},
    )
    with Engine(settings) as engine:
        print(f"{_MARK}{{}}", flush=True)
        questions: dict[str, Callable[[], dict[str, float]]] = {
            "generate": lambda: _generate(engine, name, load),
            "prefill": lambda: {"prefill": _seconds(engine, name, load, 1)[0]},
            "stream": lambda: _stream(engine, name, load),
            "payload": lambda: time_payload(MODEL),
            "shared": lambda: time_shared_memory(MODEL),
        }
        for line in sys.stdin:
            print(f"{_MARK}{json.dumps(questions[line.strip()]())}", flush=True)


def _prompts(engine: Engine, load: _Load) -> list[list[int]]:
    size = engine._limits()["vocab_size"]
    found: list[list[int]] = np.random.default_rng(0).integers(3, size, (load.samples, load.prompt)).tolist()
    return found


def _seconds(engine: Engine, name: str, load: _Load, response: int) -> tuple[float, list[dict[str, Any]]]:
    """Generate one batch; the time is until the replies are there, with the bytes of their routes."""
    prompts, params = _prompts(engine, load), {"temperature": 0.0, "max_new_tokens": response, "ignore_eos": True}
    start = time.perf_counter()
    replies = engine.replies(prompts, params, routes=name != "off")
    return time.perf_counter() - start, replies


def _generate(engine: Engine, name: str, load: _Load) -> dict[str, float]:
    seconds, replies = _seconds(engine, name, load, load.response)
    found: dict[str, float] = {"seconds": seconds}
    if name == "off":
        return found
    payload, num_tokens = payload_of(replies[0], name), load.prompt + load.response
    if name == "patched":
        trace = trace_from_reply(replies[0], _prompts(engine, load)[0], moe=engine.moe)
        assert trace.num_tokens == num_tokens
    else:
        assert engine.moe is not None
        assert len(payload) == native_bytes(num_tokens, engine.moe)
    found["bytes_per_token_engine"] = len(payload) / num_tokens
    found["bytes_per_token_http"] = len(base64.b64encode(payload)) / num_tokens
    return found


def _stream(engine: Engine, name: str, load: _Load) -> dict[str, float]:
    """Stream one batch whose requests end one after the other; return the slowest hundredth of steps, in seconds."""
    prompts = _prompts(engine, load)
    # From half the tokens to all of them.
    lengths = [load.response - i * load.response // (2 * load.samples) for i in range(load.samples)]
    gaps = list[float]()

    async def follow(prompt: list[int], length: int) -> None:
        stamps, params = list[float](), {"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True}
        routes = name != "off"
        async for _ in await engine._engine.async_generate(
            input_ids=prompt, sampling_params=params, stream=True, return_routed_experts=routes
        ):
            stamps.append(time.perf_counter())
        # The first ones wait for the others' prefill.
        gaps.extend(np.diff(stamps)[2:])

    async def follow_all() -> None:
        await asyncio.gather(*map(follow, prompts, lengths))

    engine._engine.loop.run_until_complete(follow_all())
    return {"itl_p99": float(np.quantile(gaps, 0.99))}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
