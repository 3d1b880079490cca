"""The README's lines for a training script of one's own are a script that runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from r3_adapter.sglang.cpu import cpu_environment

pytestmark = pytest.mark.engine


def test_the_readmes_script_runs(checkpoint: Path, tmp_path: Path) -> None:
    import os

    script = Path(__file__).with_name("readme_script.py")
    command = [sys.executable, str(script), str(checkpoint), str(tmp_path / "rendezvous")]
    environment = {**os.environ, **cpu_environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "67 0 " in done.stdout
