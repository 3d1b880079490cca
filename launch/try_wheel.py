"""Uses an installed wheel: the routes of two samples go to all ranks of a layout and come back, by the compiled module.

It needs what the package itself depends on and nothing more. Run it where the checkout is not on the path:

    python launch/try_wheel.py
"""

import platform
from pathlib import Path

import numpy as np

import r3_adapter
from r3_adapter import _core
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import collect, repack
from r3_adapter.trace import RoutingTrace

NUM_LAYERS, NUM_EXPERTS, TOPK = 4, 16, 2
LENGTHS = (9, 14)


def make_trace(rng: np.random.Generator, num_tokens: int) -> RoutingTrace:
    """Return a trace of random experts, whose last token was not captured, as in a rollout."""
    ids = rng.random((num_tokens, NUM_LAYERS, NUM_EXPERTS)).argsort(axis=2)[:, :, :TOPK].astype(np.uint8)
    ids[-1] = 0
    return RoutingTrace(
        topk_ids=ids,
        token_ids=rng.integers(0, 1000, num_tokens, dtype=np.int32),
        version_ids=np.array([0] * (num_tokens - 1) + [-1], dtype=np.int32),
        layer_ids=np.arange(NUM_LAYERS, dtype=np.int32),
        num_experts=NUM_EXPERTS,
        weight_versions=("0",),
    )


def main() -> None:
    rng = np.random.default_rng(0)
    traces = [make_trace(rng, length) for length in LENGTHS]
    layout = ParallelLayout(tp=2, pp=2, cp=2, ep=4, etp=1)
    packing = Packing.padded(len(traces), seq_length=16)
    stage = NUM_LAYERS // layout.pp
    shards = []
    for rank in range(layout.world_size):
        first = stage * layout.coords(rank).pp_rank
        shards.append(repack(traces, packing, layout, rank, layer_ids=range(first, first + stage), num_threads=2))
    found = collect(shards, [trace.token_ids for trace in traces], layer_ids=range(NUM_LAYERS), num_experts=NUM_EXPERTS)
    if found != traces:
        raise SystemExit(f"{_core.__file__}: routes came back from {len(shards)} ranks other than they went")
    place = Path(r3_adapter.__path__[0])
    print(
        f"{len(shards)} ranks hold each route once: CPython {platform.python_version()}, {platform.machine()}, {place}"
    )


if __name__ == "__main__":
    main()
