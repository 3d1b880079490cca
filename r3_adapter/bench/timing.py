"""How long calls take and what they make the host and the device do, on a GPU or without one.

On a GPU a call's kernels run behind the host. `Meter.launched` is the time of a host that is not ahead: the kernels
and their launches. `Meter.hidden` is the device's own time: a kernel that sleeps goes ahead, while the host launches
the rest. `Meter.host` is the host's own time, until the call returns, while the device sleeps. Without a GPU all are
the time of the call.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

_CACHE_BYTES = 128 << 20
"""More than the second-level cache of any GPU, so that a call finds nothing of the one before in it."""
_CYCLES_A_MICROSECOND = 2_000
_MOST_CYCLES = 40_000_000
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
)


@dataclass(frozen=True)
class Work:
    """What one call makes the machine do.

    launches: kernels, copies and fills that the host starts; without a GPU, operators.
    waits: times that the host waits for the device. read_on_host: those of them that torch itself warns of.
    kernels_us: microseconds that the device is busy, each kernel's own added up; without a GPU, the operators' own.
    longest: name and microseconds of the kernels that take the longest, each added up.
    """

    launches: int
    waits: Mapping[str, int]
    read_on_host: int
    kernels_us: float
    longest: Mapping[str, float]


class Meter:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self._cold = torch.empty(_CACHE_BYTES if self.gpu else 0, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        """Wait until the device has done all."""
        if self.gpu:
            torch.cuda.synchronize()

    def launched(self, call: Call) -> float:
        """Return a call's microseconds with its launches, the caches cold."""
        return self._timed(call, cycles=0)

    def hidden(self, call: Call, launched: float) -> float:
        """Return a call's microseconds on the device alone; launched: those with launches, which must be hidden."""
        return self._timed(call, cycles=_cycles(launched))

    def host(self, call: Call, launched: float) -> float:
        """Return the microseconds until a call returns, which waits for nothing; launched: those with launches."""
        if not self.gpu:
            return self._timed(call, cycles=0)
        torch.cuda.synchronize()
        torch.cuda._sleep(_cycles(launched))  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        kept = call()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        del kept
        return seconds * 1e6

    def _timed(self, call: Call, *, cycles: int) -> float:
        if not self.gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._cold.zero_()
        torch.cuda.synchronize()
        if cycles:
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        begin.record()
        # What it returns is kept until the end: to give memory back is not the call's work.
        kept = call()
        end.record()
        end.synchronize()
        del kept
        return float(begin.elapsed_time(end) * 1e3)

    def work(self, call: Call) -> Work:
        """Return what one call makes the machine do, by torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])]
        call()
        self.wait()
        with profile(activities=activities) as found:
            call()
            self.wait()
        events = found.events() or []
        if not self.gpu:
            names = [event.name for event in events if event.name.startswith("aten::")]
            times = {each.key: each.self_cpu_time_total for each in found.key_averages()}
            return Work(len(names), {}, 0, sum(times.values()), _longest(times))
        names = [event.name for event in events if "CUDA" not in str(event.device_type)]
        busy: Counter[str] = Counter()
        for event in events:
            if "CUDA" in str(event.device_type):
                busy[event.name] += event.time_range.elapsed_us()
        # The wait after the call is the meter's own.
        waits = Counter(name for name in names if name in _WAITS)
        waits["cudaDeviceSynchronize"] -= 1
        launches = sum(name in _LAUNCHES for name in names)
        return Work(launches, dict(+waits), self._read_on_host(call), float(sum(busy.values())), _longest(busy))

    def _read_on_host(self, call: Call) -> int:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.wait()
        return sum("synchronizing" in str(each.message) for each in seen)


def _cycles(launched: float) -> int:
    """Return for how long the device must sleep to hide launches; launched: microseconds with launches."""
    return min(int(3 * launched * _CYCLES_A_MICROSECOND), _MOST_CYCLES)


def _longest(times: Mapping[str, float], most: int = 8) -> dict[str, float]:
    return {name[:100]: float(times[name]) for name in sorted(times, key=lambda name: -times[name])[:most]}


def in_turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Return the order of each round: everyone is first, and next to everyone else, about equally often.

    What a call leaves behind, in caches or in the allocator, then falls on all of those that come after it.
    """
    count = len(names)
    orders = []
    for index in range(rounds):
        start = (index // 2) % count
        order = [*names[start:], *names[:start]]
        orders.append(order[::-1] if index % 2 else order)
    return orders
