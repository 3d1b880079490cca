"""The rows of a forward pass go to the host buffer value by value, and those of a request come out of it so."""

import time
from types import SimpleNamespace

import torch
from sglang.srt.state_capturer.base import TopkCaptureOutput


def least(step):
    found = []
    for _ in range(20):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return f"{1e3 * min(found):.2f} ms"


if __name__ == "__main__":
    rows = torch.randint(128, (8192, 24, 8), dtype=torch.int32)
    host = SimpleNamespace(buffer=torch.zeros(65536, 24, 8, dtype=torch.int32))
    slots = torch.randperm(65536)[:8192]
    array, places, values = host.buffer.numpy(), slots.numpy(), rows.numpy()
    print("scatter:", least(TopkCaptureOutput(slots, rows, host).finalize), end=", ")
    print("as rows:", least(lambda: array.__setitem__(places, values)))
    print("gather:", least(lambda: host.buffer[slots]), end=", ")
    print("as rows:", least(lambda: array.take(places, axis=0, mode="clip")))
