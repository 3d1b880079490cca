"""With pipeline parallelism a reply has the experts of the first rank's layers, and zeros for the others."""

import os

from sglang_engine import SHAPE, rows_of, start_engine

if __name__ == "__main__":
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|0"  # two ranks on one core
    with start_engine(pp_size=2) as engine:
        rows = rows_of(engine.replies([[3, 5, 7, 11]], {"max_new_tokens": 4, "ignore_eos": True})[0])
    silent = [layer for layer in range(SHAPE.num_layers) if not rows[:, layer].any()]
    print(f"layers with expert 0 in all places of all rows: {silent} of {SHAPE.num_layers}, no error")
