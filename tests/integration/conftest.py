"""Real engines, started once for all tests that can share what they give."""

from pathlib import Path

import pytest

from r3_adapter.prove import perturbed_rollout
from r3_adapter.rollout import Sample
from r3_adapter.tiny import write_checkpoint

SEED = 7


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in float32."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, dtype="float32", seed=SEED)
    return folder


@pytest.fixture(scope="session")
def perturbed(checkpoint: Path) -> list[Sample]:
    """A rollout with a fifth of its rows perturbed."""
    return perturbed_rollout(checkpoint, seed=SEED, num_samples=16)
