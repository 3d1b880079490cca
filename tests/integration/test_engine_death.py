"""What would kill an engine is refused, and an engine that dies is an error of the call, not a signal to the caller."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r3_adapter.sglang.cpu import cpu_environment

pytestmark = pytest.mark.engine


def test_the_caller_survives_its_engine(checkpoint: Path) -> None:
    script = Path(__file__).with_name("engine_death.py")
    command = [sys.executable, "-W", "ignore", str(script), str(checkpoint)]
    environment = {**os.environ, **{name: value for name, value in cpu_environment().items() if name != "PYTHONPATH"}}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("prompt 0: token id 1000000"))
    found = lines[first:]
    assert found[:9] == [
        "prompt 0: token id 1000000 at position 1 outside 0 to vocab_size (512) - 1",
        "prompt 0: token id -1 at position 1 outside 0 to vocab_size (512) - 1",
        "prompt 0: has no token",
        "prompt 0: 5000 tokens >= context length (2048)",
        "prompt 0: True at position 0 is no token id",
        "prompt 0: 'ab' is no sequence of token ids",
        "prompts: 5 is no sequence of prompts",
        "sampling parameters: repetition_penalty 1.1 changes the scored distribution, and a trainer cannot reproduce "
        "that; only 1.0 is allowed",
        "SGLang refuses: ValueError: Requested token count exceeds the model's maximum context length of 2048 tokens",
    ]
    for line in found[9:11]:
        assert line.startswith("the engine is dead: its scheduler_0 (pid ") and line.endswith("ended with code -9")
    assert found[11].startswith("alive")
