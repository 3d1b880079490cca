"""Several models in one process, training, evaluation and replay interleaved: nothing of one reaches another."""

import sys
from pathlib import Path

import pytest

from r3_adapter.processes import run_together
from r3_adapter.proof.tiny import write_checkpoint
from r3_adapter.rollout import Sample, save_samples

pytestmark = pytest.mark.engine
RANK = {"OMP_NUM_THREADS": "1"}


def test_interleaved_models_compute_what_they_compute_alone(
    checkpoint: Path, perturbed: list[Sample], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "other", dtype="float32", seed=99)
    save_samples(tmp_path / "samples", perturbed[:4])
    paths = [str(checkpoint), str(tmp_path / "other"), str(tmp_path / "samples"), str(tmp_path / "rendezvous")]
    run_together([[sys.executable, str(Path(__file__).with_name("models_apart.py")), *paths]], env=[RANK], timeout=300)
