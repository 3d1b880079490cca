"""A retracted request has the log-probabilities of two computations, and the experts of the second alone."""

import numpy as np
from sglang_engine import PERTURB, logprobs_with, reply_retracted, rows_of, start_engine

if __name__ == "__main__":
    prompt = [3, 5, 7, 11]
    with start_engine(perturb=PERTURB, dtype="float32") as engine:
        reply = reply_retracted(engine, prompt)
    sampled = np.array([pair[0] for pair in reply["meta_info"]["output_token_logprobs"]])
    replayed = logprobs_with(rows_of(reply), prompt + reply["output_ids"], engine.settings.model_path)
    gap = np.abs(replayed[len(prompt) - 1 :] - sampled)
    count = int(np.flatnonzero(gap > 1e-3)[-1]) + 1
    print(f"retractions: {reply['meta_info']['num_retractions']}; log-probabilities replayed with the reply's experts:")
    print(f"the first {count} outputs off by up to {gap[:count].max():.2f}, ", end="")
    print(f"the other {len(gap) - count} by up to {gap[count:].max():.6f}")
