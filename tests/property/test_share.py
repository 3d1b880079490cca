"""A rank touches only its own share: the pages of all other tokens and layers are taken away from the process."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import ctypes, mmap, sys
import numpy as np
from r3_adapter.frozen import freeze
from r3_adapter.layout import Packing, ParallelLayout, local_segments
from r3_adapter.repack import repack
from r3_adapter.trace import RoutingTrace

# Two pages a token: the layers of each of two pipeline stages fill one.
page, tokens, topk = mmap.PAGESIZE, 16, 16
half = page // topk
memory = mmap.mmap(-1, tokens * 2 * page)
ids = np.frombuffer(memory, dtype=np.uint8).reshape(tokens, 2 * half, topk)
rng = np.random.default_rng(0)
ids[:] = rng.random((tokens, 2 * half, 20)).argsort(axis=2)[:, :, :topk]
trace = RoutingTrace(freeze(ids), np.arange(tokens, dtype=np.int32), np.zeros(tokens, dtype=np.int32),
                     np.arange(2 * half, dtype=np.int32), 20, ("a",))
assert np.shares_memory(trace.topk_ids, ids)
layout, packing = ParallelLayout(tp=2, pp=2, cp=2), Packing.packed([0, tokens])
rank = int(sys.argv[1])
coords = layout.coords(rank)
layers = np.arange(half) + half * coords.pp_rank
mine = {pos + i for _, pos, length, _, _ in local_segments(packing, layout, coords).tolist() for i in range(length)}
wanted = {token: ids[token, layers].copy() for token in mine}
spoilt = sys.argv[2]
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for token in range(tokens):
    for stage in range(2):
        own = token in mine and stage == coords.pp_rank
        if not own or (spoilt == "own" and token == min(mine)):
            address = ids.ctypes.data + (2 * token + stage) * page
            assert protect(address, page, 0) == 0, ctypes.get_errno()
for dtype in (np.int16, np.uint8):
    for threads in (1, 3):
        routes = repack([trace], packing, layout, rank, layer_ids=layers, dtype=dtype, num_threads=threads, count=True)
        for _, pos, length, row, _ in routes.segments.tolist():
            for i in range(length):
                assert np.array_equal(routes.topk_ids[:, row + i], wanted[pos + i])
print("done")
"""


def run(rank, spoilt):
    command = (sys.executable, "-c", textwrap.dedent(PROGRAM), str(rank), spoilt)
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="takes pages away with mprotect")
def test_a_rank_reads_only_its_share():
    for rank in (0, 3, 6):
        done = run(rank, "others")
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert run(3, "own").returncode < 0  # killed: the pages are really gone
