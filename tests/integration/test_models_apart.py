"""Several models in one process, training, evaluation and replay interleaved: nothing of one reaches another."""

import subprocess
import sys
from pathlib import Path

import pytest

from r3_adapter.rollout import Sample, save_samples
from r3_adapter.tiny import write_checkpoint

pytestmark = pytest.mark.engine


def test_interleaved_models_compute_what_they_compute_alone(
    checkpoint: Path, perturbed: list[Sample], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "other", dtype="float32", seed=99)
    save_samples(tmp_path / "samples", perturbed[:4])
    script = Path(__file__).with_name("models_apart.py")
    paths = [str(checkpoint), str(tmp_path / "other"), str(tmp_path / "samples"), str(tmp_path / "rendezvous")]
    command = [sys.executable, str(script), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
