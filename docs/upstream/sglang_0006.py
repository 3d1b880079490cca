"""A prefix from the cache has the experts of the weights that computed it; SGLang's own payload does not say so."""

import tempfile
from pathlib import Path

import numpy as np
from sglang_engine import rows_of, run_to_end, start_engine

from r3_adapter.proof.tiny import write_checkpoint

if __name__ == "__main__":
    other = Path(tempfile.mkdtemp())
    write_checkpoint(other, dtype="float32", seed=1)
    prompt, params = list(range(3, 35)), {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
    with start_engine(radix_cache=True) as engine:
        (before,) = engine.replies([prompt], params)
        run_to_end(engine.update_weights(other, "new"))
        (after,) = engine.replies([prompt], params)
    same = np.mean((rows_of(before)[:31] == rows_of(after)[:31]).all(axis=(1, 2)))
    print(
        f"weights {after['meta_info']['weight_version']!r}: share of prompt rows that are the old weights': {same:.2f}"
    )
