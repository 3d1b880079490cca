"""The parameters that a plan counts for a rank are those that Megatron gives it."""

import json
import sys
from pathlib import Path

import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.processes import run_together

pytestmark = pytest.mark.engine


def test_a_rank_has_the_parameters_that_the_plan_says(checkpoint: Path, tmp_path: Path) -> None:
    layout = {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 1}
    script, ranks = Path(__file__).with_name("plan_parameters.py"), range(ParallelLayout(**layout).world_size)
    tail = [str(checkpoint), str(tmp_path / "rendezvous"), json.dumps(layout)]
    commands = [[sys.executable, str(script), str(rank), *tail] for rank in ranks]
    run_together(commands, env=[{}] * len(commands), timeout=300)
