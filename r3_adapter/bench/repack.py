"""`r3 bench repack`: repack beside memcpy, numpy and torch on the same routes in one run, and the set coding.

Every result is compared before its time counts. Times are medians; times of one thread are processor time, so that
others on the machine disturb them little, times of two are wall time.
S: tokens of a sample; M: MoE layers of a trace; K: experts a token; E: experts of a layer; T: tokens of a rank.
"""

import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter import _core
from r3_adapter.arena import Arena
from r3_adapter.bench import baselines
from r3_adapter.codec import decode, encode
from r3_adapter.errors import R3Error
from r3_adapter.frozen import freeze
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import RankRoutes, repack
from r3_adapter.trace import RoutingTrace

NUM_LAYERS, TOPK, NUM_EXPERTS = 48, 8, 128
PARALLEL = ParallelLayout.smallest(tp=2, cp=2, pp=4, vpp=2, ep=8)
MIB = 1 << 20


@dataclass(frozen=True)
class Step:
    """The routes of a step and a rank that wants its share of them."""

    name: str
    traces: list[RoutingTrace]
    packing: Packing
    layout: ParallelLayout
    layers: list[int]
    dtype: np.dtype[Any]
    tokens: npt.NDArray[np.int64]
    arena: Arena

    def repack(self, num_threads: int = 1, slot_of: npt.NDArray[np.int32] | None = None) -> RankRoutes:
        return repack(
            self.traces,
            self.packing,
            self.layout,
            0,
            layer_ids=self.layers,
            input_ids=self.tokens,
            dtype=self.dtype,
            num_threads=num_threads,
            arena=self.arena,
            slot_of=slot_of,
        )

    def num_bytes(self, routes: RankRoutes) -> tuple[int, int]:
        """Return the bytes that repack must read and write: ids, versions and tokens of the rank's rows."""
        replayed = routes.num_replayed
        read = replayed * (len(self.layers) * TOPK + 4 + 4 + 8)
        return read, routes.topk_ids.nbytes + routes.row_versions.nbytes


def bench_repack(*, num_tokens: int = 1 << 20, repeats: int = 9, max_mib: int = 4096) -> dict[str, Any]:
    """Measure, and return the figures.

    num_tokens: of the step; 48 layers x top 8 x 1 Mi tokens are 0.4 GB.
    max_mib: routes of the largest of the steps from 1 MiB on whose times should be linear.

    Raises:
        R3Error: a baseline's or repack's result is wrong.
    """
    rng = np.random.default_rng(0)
    traces = make_traces(rng, num_tokens)
    report: dict[str, Any] = {"machine": machine(), "command": "r3 bench repack", "routes_bytes": num_tokens * 384}
    parallel, of_stage = "tp2 cp2 pp4 vpp2 ep8", [*range(6), *range(24, 30)]
    # Its layers are numbered anew, since the baselines take layers by their place.
    numbers = np.arange(len(of_stage), dtype=np.int32)
    staged = [replace(trace.at_layers(of_stage), layer_ids=numbers) for trace in traces]
    cases = {
        f"{name} {dtype}": measure_case(make_step(name, given, layout, layers, dtype), memory_of(traces), repeats)
        for name, given, layout, layers in (
            ("none", traces, ParallelLayout(), list(range(NUM_LAYERS))),
            (f"{parallel}, chunk 0", traces, PARALLEL, of_stage[:6]),
            (f"{parallel}, chunk 1", traces, PARALLEL, of_stage[6:]),
            (f"{parallel}, chunk 0 of its stage's layers", staged, PARALLEL, list(range(6))),
            (f"{parallel}, chunk 1 of its stage's layers", staged, PARALLEL, list(range(6, 12))),
        )
        for dtype in ("int16", "uint8")
    }
    del staged
    plain = make_step("none", traces, ParallelLayout(), list(range(NUM_LAYERS)), "int16")
    report["memcpy_ratio_1t"] = cases["none int16"]["memcpy_ratio"]
    for key, is_staged in (("parallel", False), ("stage", True)):
        which = [name for name in cases if parallel in name and ("stage" in name) == is_staged]
        report[f"memcpy_ratio_1t_{key}"] = min(cases[name]["memcpy_ratio"] for name in which)
    report |= measure_threads(plain, repeats)
    report |= measure_others(plain)
    of_rank = make_step("slots", traces, PARALLEL, of_stage[:6], "int16")
    report["placed_rate"] = measure_slots(plain, repeats)
    report["placed_rate_parallel"] = measure_slots(of_rank, repeats)
    report["peak_extra_mib"] = peak_extra_mib(plain)
    report |= measure_linearity(traces, max_mib)
    report["bytes_read_share"] = bytes_read_share(traces)
    report |= measure_sets(traces)
    report["cases"] = cases
    return report


def machine() -> dict[str, Any]:
    model = platform.processor()
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average": list(os.getloadavg()),
    }


def make_traces(rng: np.random.Generator, num_tokens: int) -> list[RoutingTrace]:
    """Return traces of log-normal lengths from 128 to 32 Ki, side by side in one memory that can be copied at once."""
    lengths: list[int] = []
    while (rest := num_tokens - sum(lengths)) > 0:
        length = int(np.clip(rng.lognormal(7.5, 1.2), 128, 32768))
        lengths.append(min(length, rest))
    pool = rng.random((4096, NUM_EXPERTS)).argsort(axis=1)[:, :TOPK].astype(np.uint8)
    layer_ids = np.arange(NUM_LAYERS, dtype=np.int32)
    memory = np.empty((num_tokens, NUM_LAYERS, TOPK), dtype=np.uint8)
    token_ids = rng.integers(0, 150_000, num_tokens).astype(np.int32)
    version_ids = np.zeros(num_tokens, dtype=np.int32)
    begins = np.cumsum([0, *lengths])
    for begin, end in pairwise(begins.tolist()):
        memory[begin:end] = pool[rng.integers(0, len(pool), (end - begin, NUM_LAYERS))]
        version_ids[end - 1], memory[end - 1] = -1, 0  # the last token was not captured
    memory, token_ids, version_ids = freeze(memory), freeze(token_ids), freeze(version_ids)
    return [
        RoutingTrace(memory[cut], token_ids[cut], version_ids[cut], layer_ids, NUM_EXPERTS, ("step-1",))
        for cut in (slice(begin, end) for begin, end in pairwise(begins.tolist()))
    ]


def memory_of(traces: list[RoutingTrace]) -> npt.NDArray[np.uint8]:
    """Return the memory that `make_traces` put all ids in."""
    base = traces[0].topk_ids.base
    assert isinstance(base, np.ndarray)
    return base


def make_step(name: str, traces: list[RoutingTrace], layout: ParallelLayout, layers: list[int], dtype: str) -> Step:
    unit = 2 * layout.cp if layout.cp > 1 else 1
    padded_lengths = [-(-trace.num_tokens // unit) * unit for trace in traces]
    padded_lengths[-1] += -sum(padded_lengths) % (unit * layout.tp)
    packing = Packing.packed(np.cumsum([0, *padded_lengths]))
    tokens = []
    for trace, padded_length in zip(traces, padded_lengths, strict=True):
        sample = np.zeros(padded_length, dtype=np.int64)
        sample[: trace.num_tokens] = trace.token_ids
        chunks = np.split(sample, 2 * layout.cp) if layout.cp > 1 else [sample]
        tokens.append(np.concatenate([chunks[0], chunks[-1]]) if layout.cp > 1 else sample)
    return Step(name, traces, packing, layout, layers, np.dtype(dtype), np.concatenate(tokens), Arena())


def seconds(action: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    begin = clock()
    action()
    return clock() - begin


def check(step: Step, routes: RankRoutes, what: str, found: npt.NDArray[Any] | None = None) -> None:
    """Compare with the direct assignment of numpy in rows that are replayed."""
    wanted = np.zeros_like(routes.topk_ids)
    baselines.numpy_direct([trace.topk_ids for trace in step.traces], routes.segments, step.layers, wanted)
    rows = routes.row_versions >= 0
    if not np.array_equal((routes.topk_ids if found is None else found)[:, rows], wanted[:, rows]):
        raise R3Error(f"{step.name}: the result of {what} is wrong")


def measure_case(step: Step, memory: npt.NDArray[np.uint8], repeats: int) -> dict[str, Any]:
    """Measure one thread against copies of as many bytes, which are memory's, and of the same bytes."""
    routes = step.repack()
    check(step, routes, "repack")
    read, written = step.num_bytes(routes)
    ids = [trace.topk_ids for trace in step.traces]
    to = np.ones((read + written) // 2, dtype=np.uint8)
    share = np.ones((len(routes.row_versions), len(step.layers) * TOPK), dtype=np.uint8)
    del routes
    first, last = step.layers[0], step.layers[-1] + 1
    segments = step.repack().segments
    times: list[tuple[float, float, float]] = []
    for _ in range(repeats):
        times.append(
            (
                seconds(lambda: baselines.copy_memory(memory, to, len(to))),
                seconds(step.repack),
                seconds(lambda: baselines.copy_share(ids, segments, first, last, share)),
            )
        )
    return {
        "memcpy_ratio": round(median(copy / ours for copy, ours, _ in times), 3),
        "same_places_ratio": round(median(same / ours for _, ours, same in times), 3),
        "memcpy_ms": round(1e3 * median(copy for copy, _, _ in times), 2),
        "repack_ms": round(1e3 * median(ours for _, ours, _ in times), 2),
        "read_mib": round(read / MIB, 1),
        "written_mib": round(written / MIB, 1),
    }


def measure_threads(step: Step, repeats: int) -> dict[str, Any]:
    """Measure how much faster two threads are, and two threads that only copy."""
    routes = step.repack()
    read, written = step.num_bytes(routes)
    del routes
    memory = memory_of(step.traces)
    to = np.ones((read + written) // 2, dtype=np.uint8)
    scaling, copy_scaling = [], []
    for _ in range(repeats):
        one, two = (seconds(lambda n=n: step.repack(n), time.perf_counter) for n in (1, 2))  # type: ignore[misc]
        scaling.append(one / two)
        one, two = (
            seconds(lambda n=n: baselines.copy_memory(memory, to, len(to), n), time.perf_counter)  # type: ignore[misc]
            for n in (1, 2)
        )
        copy_scaling.append(one / two)
    return {"scaling_2t": round(median(scaling), 3), "copy_scaling_2t": round(median(copy_scaling), 3)}


def measure_slots(step: Step, repeats: int) -> float:
    """Return the rate with experts that lie elsewhere, and are looked up in a table, over that without."""
    rng = np.random.default_rng(0)
    slot_of = rng.random((len(step.layers), NUM_EXPERTS)).argsort(axis=1).astype(np.int32)
    plain = step.repack()
    rows = plain.row_versions >= 0
    ids = plain.topk_ids[:, rows].copy()
    del plain
    found = step.repack(slot_of=slot_of)
    if not np.array_equal(found.topk_ids[:, rows], np.stack([of[each] for of, each in zip(slot_of, ids, strict=True)])):
        raise R3Error(f"{step.name}: the result with a table is wrong")
    del found, ids
    times = [(seconds(step.repack), seconds(lambda: step.repack(slot_of=slot_of))) for _ in range(repeats)]
    return round(median(without / placed for without, placed in times), 3)


def measure_others(step: Step, repeats: int = 3) -> dict[str, Any]:
    """Measure numpy, as well as it can be written, and torch as trainers use it."""
    routes = step.repack()
    ids = [trace.topk_ids for trace in step.traces]
    ours = median(seconds(step.repack) for _ in range(3 * repeats))
    found = np.zeros_like(routes.topk_ids)
    result: dict[str, Any] = {}
    for function in (baselines.numpy_direct, baselines.numpy_blocked):
        times = [seconds(lambda f=function: f(ids, routes.segments, step.layers, found)) for _ in range(repeats)]  # type: ignore[misc]
        check(step, routes, function.__name__, found)
        result[f"vs_{function.__name__}"] = round(median(times) / ours, 2)
    result["vs_numpy_single_write"] = min(result["vs_numpy_direct"], result["vs_numpy_blocked"])
    try:
        import torch
    except ImportError:
        result["vs_torch_indexing"] = None
        return result
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given buffer is not writable")  # and it is not written
    arguments = (ids, step.packing.padded_lengths, step.layout.cp, 0, step.layout.tp, 0, step.layers)
    layers = baselines.torch_indexing(*arguments)
    check(step, routes, "torch_indexing", np.stack([layer.numpy() for layer in layers]))
    del layers
    times = [seconds(lambda: baselines.torch_indexing(*arguments)) for _ in range(repeats)]
    result["vs_torch_indexing"] = round(median(times) / ours, 2)
    result["torch"] = torch.__version__
    return result


def peak_extra_mib(step: Step) -> float | None:
    """Return how far memory rises while repack runs, beyond what its result takes; None where the system cannot say."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    step.repack()  # the arena has touched its memory
    reset.write_text("5", encoding="utf-8")
    before = _status_kib("VmRSS")
    step.repack()
    return round((_status_kib("VmHWM") - before) / 1024, 2)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_linearity(traces: Sequence[RoutingTrace], max_mib: int) -> dict[str, Any]:
    """Measure steps from 1 MiB of routes on, four times larger each; fit the exponent of time over size."""
    flat = list(traces)
    points = []
    size = 1
    while size <= max_mib:
        chosen: list[RoutingTrace] = []
        need = size * MIB // (NUM_LAYERS * TOPK)
        at = 0
        while need > 0:  # the same traces again and again where the step is larger than all of them
            trace = flat[at % len(flat)]
            if trace.num_tokens > need:
                trace = trace.rows(0, need)
            chosen.append(trace)
            need -= trace.num_tokens
            at += 1
        step = make_step("linear", chosen, ParallelLayout(), list(range(NUM_LAYERS)), "int16")
        step.repack()
        times = [seconds(step.repack) for _ in range(max(3, min(200, 1024 // size)))]
        points.append((size, median(times)))
        size *= 4
    sizes, times = np.array(points).T
    slope = np.polyfit(np.log(sizes), np.log(times), 1)[0] if len(points) > 1 else 1.0
    return {
        "linearity_slope": round(float(slope), 3),
        "linearity_ms": {f"{int(size)} MiB": round(1e3 * float(t), 3) for size, t in points},
    }


def bytes_read_share(traces: list[RoutingTrace]) -> dict[str, float]:
    """Return which part of all ids one rank reads, both of its model chunks together, and what a fair share is.

    Counted from the segments; tests take every other byte away from a process to show that it reads no more.
    """
    read = 0
    for layers in (list(range(6)), list(range(24, 30))):
        routes = make_step("share", traces, PARALLEL, layers, "uint8").repack()
        read += routes.num_replayed * len(layers) * TOPK
    return {
        "found": round(read / sum(trace.topk_ids.nbytes for trace in traces), 5),
        "fair": 1 / (PARALLEL.tp * PARALLEL.cp * PARALLEL.pp),
    }


def measure_sets(traces: list[RoutingTrace], repeats: int = 5) -> dict[str, Any]:
    """Measure coding and decoding of the longest trace, in bytes of its uint8 ids."""
    trace = max(traces, key=lambda trace: trace.num_tokens)
    bits = _core.set_bits(NUM_EXPERTS, TOPK)
    routes = int(trace.captured.sum()) * NUM_LAYERS
    codes = np.empty((routes * bits + 7) // 8, dtype=np.uint8)
    ids = np.empty_like(trace.topk_ids)
    shared: dict[str, Any] = {"version_ids": trace.version_ids, "num_experts": NUM_EXPERTS, "codes": codes}
    encoding = median(seconds(lambda: _core.encode_sets(topk_ids=trace.topk_ids, **shared)) for _ in range(repeats))
    decoding = median(seconds(lambda: _core.decode_sets(topk_ids=ids, **shared)) for _ in range(repeats))
    data = encode(trace)
    if not np.array_equal(ids, np.sort(trace.topk_ids, axis=2)) or not np.array_equal(decode(data).topk_ids, ids):
        raise R3Error("the decoded sets are wrong")
    bound = routes * bits / 8
    return {
        "set_decode_gbps": round(ids.nbytes / decoding / 1e9, 3),
        "set_encode_gbps": round(ids.nbytes / encoding / 1e9, 3),
        "set_size_over_bound": round((len(data) - trace.token_ids.nbytes - trace.version_ids.nbytes) / bound, 5),
    }
