"""Samples of one prompt in one batch get one and the same experts for it, though each computed it for itself."""

import numpy as np
from sglang_engine import PERTURB, rows_of, start_engine

if __name__ == "__main__":
    prompt = list(range(3, 35))
    with start_engine(radix_cache=True, perturb=PERTURB) as engine:
        found = engine.replies([prompt, prompt], {"temperature": 1.0, "max_new_tokens": 4, "ignore_eos": True})
    first, second = (rows_of(reply)[: len(prompt)] for reply in found)
    same = np.mean((np.sort(first) == np.sort(second)).all(axis=(1, 2)))
    cached = [reply["meta_info"]["cached_tokens"] for reply in found]
    print(f"both computed all {len(prompt)} prompt tokens (cached: {cached}), half of all rows at random experts;")
    print(f"share of prompt tokens whose rows are the same in both: {same:.2f}; the second's own are lost")
