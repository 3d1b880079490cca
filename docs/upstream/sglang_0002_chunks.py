"""With capture a pipeline cannot time chunks larger than the configured ones, and turns dynamic chunking off."""

import os
import tempfile
from pathlib import Path

from sglang_engine import start_engine

from r3_adapter.proof.tiny import TinyModel, write_checkpoint

CHUNKS = {"enable_dynamic_chunking": True, "chunked_prefill_size": 64, "max_prefill_tokens": 96}

if __name__ == "__main__":
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|0"  # two ranks on one core
    folder = Path(tempfile.mkdtemp())
    # SGLang times chunks of tokens below 10,000.
    write_checkpoint(folder, dtype="float32", seed=0, shape=TinyModel(vocab_size=10_000))
    with start_engine(folder, pp_size=2, extra=CHUNKS, log_level="warning"):
        pass
