"""Replay in a model with shared experts, dense layers in a pattern and multi-token prediction, on Megatron alone."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.processes import run_together

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

SCRIPT = Path(__file__).with_name("own_routes.py")

CASES: Mapping[str, tuple[dict[str, int], dict[str, Any]]] = {
    "world 1": ({}, {}),
    "pp 2": ({"pp": 2}, {}),
    "pp 2, recompute full": (
        {"pp": 2},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "tp 2, ep 2": ({"tp": 2, "ep": 2, "etp": 1}, {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_own_routes_change_no_bit_and_others_only_their_layers(tmp_path: Path, case: Any) -> None:
    """Losses, all gradients, counts of the expert bias, and the MTP layer, whose router is routed live."""
    ranks = range(ParallelLayout.smallest(**case[0]).world_size)
    arguments = [str(SCRIPT), *map(json.dumps, case), str(tmp_path / "rendezvous")]
    run_together(
        [[sys.executable, *arguments, str(rank)] for rank in ranks],
        env=[{"OMP_NUM_THREADS": "1"}] * len(ranks),
        timeout=240,
    )
