"""What capture costs the scheduler's thread when requests end: its own classes at real sizes, without a model.

`python -m r3_adapter.bench.scheduler LAYERS` prints the figures. A forward pass fills the slots of requests, they end
together, and are sent; the same without routes is taken off. CPU time of the thread, since others use the machine too.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from r3_adapter.watchdog import MEMORY

NUM_EXPERTS, TOPK = 128, 8
CHUNK = 8192
TOGETHER = {1024: 64, 8192: 8}
"""Requests that end at once, by their tokens; a forward pass has CHUNK tokens."""
_DRAIN = "import sys, zmq; s = zmq.Context().socket(zmq.PULL); s.bind(sys.argv[1]); [s.recv() for _ in iter(int, 1)]"


def bench_scheduler(num_layers: int, rounds: int = 12) -> dict[str, float]:
    """Return milliseconds of the scheduler's thread, without those that a request takes with no routes.

    scheduler_ms_per_request_N: of a request of N tokens: its rows of forward passes, its payload, sending it.
    blocked_ms_p99: of one request that ends, in turns of the event loop that have something else to do; both lengths.
    finalize_ms: of a forward pass of CHUNK rows.
    *_in_replies: the same where payloads travel in the messages, not in files in memory.
    """
    found = _measure(num_layers, rounds, in_replies=False)
    return found | {f"{key}_in_replies": value for key, value in _measure(num_layers, rounds, in_replies=True).items()}


def _measure(num_layers: int, rounds: int, *, in_replies: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    blocked: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        _sender(Path(folder)) as sender,
        tempfile.TemporaryDirectory(dir=MEMORY) as memory,
    ):
        for num_tokens, together in TOGETHER.items():
            world = _World(num_layers, num_tokens, together, sender, None if in_replies else memory)
            with world.engine():
                runs = [(world.round(routes=True), world.round(routes=False)) for _ in range(rounds + 1)][1:]
            own = [(on.seconds - off.seconds) / together for on, off in runs]
            found[f"scheduler_ms_per_request_{num_tokens}"] = 1e3 * float(np.median(own))
            idle = float(np.median([value for _, off in runs for value in off.blocked]))
            blocked += [value - idle for on, _ in runs for value in on.blocked]
            found[f"finalize_ms_{num_tokens}"] = 1e3 * float(np.median([x for on, _ in runs for x in on.passes]))
    found["finalize_ms"] = found.pop(f"finalize_ms_{max(TOGETHER)}")
    found.pop(f"finalize_ms_{min(TOGETHER)}")
    found["blocked_ms_p99"] = 1e3 * float(np.quantile(blocked, 0.99))
    return found


class _Round:
    """Seconds of the thread: in all, of each forward pass's result, and of each request that ends."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes: list[float] = []
        self.blocked: list[float] = []

    def time(self, step: Callable[[], object], keep: list[float] | None = None) -> None:
        start = time.thread_time()
        step()
        seconds = time.thread_time() - start
        self.seconds += seconds
        if keep is not None:
            keep.append(seconds)


class _World:
    """A capturer, a pool and a streamer as a scheduler has them, and requests whose slots lie anywhere."""

    def __init__(self, num_layers: int, num_tokens: int, together: int, sender: Any, memory: str | None) -> None:
        self.num_layers, self.num_tokens, self.together, self.sender = num_layers, num_tokens, together, sender
        self.memory = memory
        self.num_slots = num_tokens * together + 1
        self.capturer: Any = None

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Publish the settings of an engine, and make its parts."""
        import torch
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.state_capturer import routed_experts_compact as compact
        from sglang.test.routed_experts_fixtures import EngineTestCase, model_config, model_of, moe_layer

        case = EngineTestCase()
        case.settings = {
            "enable_return_routed_experts": True,
            "routed_experts_format": "safetensors",
            "weight_version": "default",
            "chunked_prefill_size": CHUNK,
            "routed_experts_dir": self.memory,
        }
        case.setUp()
        sizes = {"num_hidden_layers": self.num_layers, "hidden_size": 2048, "vocab_size": 151936}
        self.pool = ReqToTokenPool(
            size=self.together, max_context_len=self.num_tokens + 1, device="cpu", enable_memory_saver=False
        )
        with patch.object(compact, "refuse_if_not_capturable", lambda *args: None):
            self.capturer = compact.create_routed_experts_capturer(
                model=model_of(*(moe_layer(i, TOPK) for i in range(self.num_layers))),
                model_config=model_config(NUM_EXPERTS, num_experts_per_tok=TOPK, **sizes),
                num_tokens=self.num_slots,
                max_running_requests=self.together,
                device="cpu",
                req_to_token=self.pool.req_to_token,
            )
        self.streamer = self._streamer()
        self.rows = torch.randint(NUM_EXPERTS, (CHUNK, TOPK), dtype=torch.int32)
        from sglang.srt.state_capturer.routed_experts import set_global_experts_capturer

        set_global_experts_capturer(self.capturer)
        try:
            yield
        finally:
            self.capturer.destroy()
            set_global_experts_capturer(None)
            case.doCleanups()

    def _streamer(self) -> Any:
        from sglang.srt.disaggregation.utils import DisaggregationMode
        from sglang.srt.distributed.parallel_state_wrapper import ParallelState
        from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
        from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        return SchedulerOutputStreamer(
            send_to_detokenizer=SenderWrapper(self.sender),
            tree_cache=None,
            ps=ParallelState.trivial(),
            server_args=None,
            is_generation=True,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            disaggregation_mode=DisaggregationMode.NULL,
            enable_hicache_storage=lambda: False,
        )

    def round(self, *, routes: bool) -> _Round:
        """Compute all requests in passes of CHUNK tokens, and let those of a pass end as a scheduler does."""
        found, slots = _Round(), np.random.default_rng(0).permutation(self.num_slots - 1) + 1
        a_pass = CHUNK // self.num_tokens
        for first in range(0, self.together, a_pass):
            rows = range(first, first + a_pass)
            requests = [self._request(row, routes) for row in rows]
            output = self._launch(rows, slots[first * self.num_tokens :][:CHUNK])
            output.map_device_tensors(lambda tensor: tensor)
            if routes:
                found.time(output.finalize, found.passes)
            asked = list[float]()
            for request in requests:
                found.time(functools.partial(self._collect, request), asked)
            before = found.seconds
            found.time(functools.partial(self.streamer.stream_output, requests, False))
            self._send_later(requests, found)
            sending = (found.seconds - before) / len(requests)
            found.blocked += [own + sending for own in asked]
            for file in [] if self.memory is None else Path(self.memory).iterdir():
                file.unlink()
        return found

    def _collect(self, request: Any) -> None:
        from sglang.srt.state_capturer.routed_experts_requests import collect_routed_experts

        if request.return_routed_experts:
            collect_routed_experts(request, self.pool)

    def _send_later(self, requests: Sequence[Any], found: _Round) -> None:
        """Go on with the event loop until all are sent."""
        try:
            from sglang.srt.state_capturer.routed_experts_held import send_held_replies
        except ImportError:
            # A series that makes payloads at once.
            return
        while not all(request.finished_output for request in requests):
            found.time(send_held_replies)
            time.sleep(0.001)

    def _launch(self, rows: range, slots: np.ndarray) -> Any:
        import torch
        from sglang.test.routed_experts_fixtures import forward_batch

        self.pool.req_to_token[rows.start : rows.stop, : self.num_tokens] = torch.from_numpy(
            slots.reshape(len(rows), self.num_tokens)
        )
        for layer_id in range(self.num_layers):
            self.capturer.capture(layer_id, self.rows)
        positions = list(range(self.num_tokens)) * len(rows)
        batch = forward_batch(slots.tolist(), positions, list(rows), [self.num_tokens] * len(rows))
        return self.capturer.on_forward_end(batch, False, None, True)

    def _request(self, row: int, routes: bool) -> Any:
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH
        from sglang.test.routed_experts_fixtures import request

        found = request(array("q", range(self.num_tokens)), row, return_routed_experts=routes)
        found.output_ids = array("q", [1])
        found.finished_reason, found.rid = FINISH_LENGTH(1), f"request-{row}"
        return found


@contextmanager
def _sender(folder: Path) -> Iterator[Any]:
    """A socket to a process that reads all and does nothing with it."""
    import zmq

    address = f"ipc://{folder}/socket"
    reader = subprocess.Popen([sys.executable, "-c", _DRAIN, address])
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close(linger=0)
        reader.kill()
        reader.wait()


if __name__ == "__main__":
    print(json.dumps(bench_scheduler(int(sys.argv[1]))))
