"""A run of the experiment on collapse goes on where a sitting ended."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_a_run_goes_on_after_its_last_checkpoint_and_its_figures_are_of_both_sittings(tmp_path: Path) -> None:
    script = Path(__file__).with_name("paper_cell.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = done.stdout.splitlines()
    assert lines == ["1 False 1 ['0']", "2 True 2 ['0', '2']", "[0, 1, 1]"], lines
    # The engine's weights were rounded in both, the trainer's in neither.
    (kept,) = (tmp_path / "search-1-GRPO+R3-seed100" / "checkpoints").iterdir()
    assert (kept / "checkpoint.manifest").is_file()
