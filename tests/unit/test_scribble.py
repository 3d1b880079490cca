"""What another thread writes while the core works on it kills no process: here what decides how much is written."""

import subprocess
import sys
import textwrap

PROGRAM = """
import threading, time
import numpy as np
from r3_adapter import _core

S, E = 100_000, 300
ids = np.tile(np.array([1, 2], np.uint16), S).reshape(S, 1, 2)
versions = np.zeros(S, np.int32)
segments = np.array([[0, 0, S, 0, 1]])
layers = np.zeros(1, np.int64)
targets = {"version_ids": versions, "segments": segments, "layer_indices": layers}
values = {"version_ids": (0, -1, -2), "segments": (0, 1, 1 << 40), "layer_indices": (0, 1 << 40, -5)}
done = False

def write():
    while not done:
        for name, target in targets.items():
            good = target.copy()
            for value in values[name]:
                target[...] = value
            target[...] = good

def calls():
    bits = S * _core.set_bits(E, 2)
    codes = np.zeros((bits + 7) // 8, np.uint8)
    out, rows = np.zeros((1, S, 2), np.int16), np.zeros(S, np.int32)
    yield lambda: _core.encode_sets(topk_ids=ids, version_ids=versions, num_experts=E, codes=codes)
    yield lambda: _core.decode_sets(codes=codes, version_ids=versions, num_experts=E, topk_ids=ids.copy())
    yield lambda: _core.repack(topk_ids=[ids], version_ids=[versions], segments=segments, layer_indices=layers, out=out,
                               row_versions=rows, num_experts=E, ep_size=1, counts=np.zeros((1, E), np.int64))
    samples = dict(topk_ids=[ids.copy()], version_ids=[rows], layer_ids=np.zeros(1, np.int32))
    yield lambda: _core.collect(ids=[out], row_versions=[versions], segments=[segments], layer_indices=[layers],
                                **samples, num_experts=E)

thread = threading.Thread(target=write)
thread.start()
for call in calls():
    stop = time.monotonic() + 1
    while time.monotonic() < stop:
        try:
            call()
        except ValueError:
            pass
done = True
thread.join()
print("done")
"""


def test_arrays_that_change_while_they_are_read_kill_no_process() -> None:
    command = (sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(PROGRAM))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
