"""slime's passes, in our own words, replay a perturbed rollout of the real SGLang in the real Megatron-core."""

import json
import sys
from pathlib import Path

import pytest

from r3_adapter.processes import run_together
from r3_adapter.proof.verdict import MAX_REPLAY, MIN_LIVE
from r3_adapter.rollout import Sample, save_samples

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

SCRIPT = Path(__file__).with_name("slime_rank.py")
SLIMELIKE = Path(__file__).parents[1] / "frameworks" / "slimelike.py"


def test_passes_replay_and_report(tmp_path: Path, checkpoint: Path, perturbed: list[Sample]) -> None:
    folder = tmp_path / "samples"
    # slime has one temperature for a whole run.
    samples = [sample for sample in perturbed if sample.temperature == 1]
    assert len(samples) == 6
    save_samples(folder, samples)
    arguments = [str(each) for each in (SCRIPT, checkpoint, folder, SLIMELIKE, tmp_path)]
    run_together(
        [[sys.executable, *arguments, str(rank)] for rank in range(2)], env=[{"OMP_NUM_THREADS": "1"}] * 2, timeout=300
    )
    said = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert said["live"] > MIN_LIVE
    assert said["replay"] < MAX_REPLAY and said["after it"] < MAX_REPLAY
    assert 0 <= said["k3"] < MAX_REPLAY**2 / 2
    # The reference model is another one: it routes live, and no k3 is told of it.
    assert said["reference"] > MIN_LIVE and said["keys"] == ["ref_log_probs"]
    rows = sum(sample.trace.num_tokens - 1 for sample in samples)
    assert sum(step["r3/replayed"] for step in said["steps"]) == rows
    for step in said["steps"]:
        assert step["r3/live"] == step["r3/stale"] == 0 and step["r3/padding"] > 0
        assert 0.5 < step["r3/agreement"] < 0.99
    assert "forward_only: replay is on already" in said["twice"]
    other = "ReplayError: rank 1: ReplayError: chunk 0, micro-batch 0: the model was given other tokens than its routes"
    assert said["another token on rank 1"].startswith(other)
    assert "rank 1: LayoutError: rank 1, micro-batch 0: trace of" in said["two samples swapped on rank 1"]
    assert "rank 1: ReplayError: no rollout_routed_experts in the training data" in said["no routes on rank 1"]
