"""verl's own engine, on the CPU, with routes of a perturbed rollout; see verl_rank.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from r3_adapter.processes import run_together
from r3_adapter.rollout import Sample, save_samples

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verl_site", Path(__file__).with_name("verl_site.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_engine_replays_a_perturbed_rollout(
    tmp_path: Path, checkpoint: Path, perturbed: list[Sample], site: ModuleType
) -> None:
    """With EP 2, then TP 2, CP 2 and PP 2: within 1e-4 with the plug-in, off by 1e-2 and more without; refusals."""
    save_samples(tmp_path / "samples", perturbed)
    script = str(Path(__file__).with_name("verl_rank.py"))
    arguments = [script, str(checkpoint), str(tmp_path / "samples"), str(tmp_path / "rendezvous")]
    run_together(
        [[sys.executable, *arguments, str(rank)] for rank in range(2)],
        env=[site.verl_environment()] * 2,
        timeout=300,
        each="rank",
    )
