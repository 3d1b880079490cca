"""Without chunked prefill, SGLang's own capture ends the scheduler at a prompt that is longer than its buffer."""

import subprocess
import sys

from sglang_engine import start_engine

if __name__ == "__main__":
    if sys.argv[1:] == ["engine"]:
        with start_engine(max_running_requests=4, extra={"chunked_prefill_size": -1}) as engine:
            print(engine.replies([list(range(3, 103))], {"max_new_tokens": 2})[0]["output_ids"])
    else:
        done = subprocess.run([sys.executable, __file__, "engine"], capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if "Error" in line]
        print(f"a prompt of 100 tokens: exit code {done.returncode}; {said[-1] if said else done.stdout}")
