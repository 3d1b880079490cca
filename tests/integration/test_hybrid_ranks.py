"""Routes reach the layers they are of on two ranks, and never a router of multi-token prediction, which is trained."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.processes import run_together

pytestmark = pytest.mark.megatron

SCRIPT = Path(__file__).with_name("hybrid_rank.py")
LAYERS = {
    "hybrid, pp 2": (["1", "3"], ["7"]),
    "hybrid, tp 2, ep 2": (["1", "3", "7"], ["1", "3", "7"]),
    "hybrid, ep 2": (["1", "3", "7"], ["1", "3", "7"]),
    "gpt, pp 2, prediction": (["0", "1"], ["2", "3"]),
    "gpt, pp 2, vpp 2, prediction": (["0", "2"], ["1", "3"]),
    # The third chunk of four has no MoE layer.
    "hybrid, pp 2, vpp 2, prediction": (["1"], ["3", "7"]),
}
NEW = "hybrid, pp 2, vpp 2, prediction"

backends = pytest.mark.parametrize("backend", ["patch", "native"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks said, by case."""
    folder = tmp_path_factory.mktemp("hybrid")
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    run_together(
        [[*command, str(rank), str(folder / "rendezvous"), str(folder / f"{rank}.json")] for rank in range(2)],
        env=[{"OMP_NUM_THREADS": "1"}] * 2,
        timeout=400,
        what="trainer",
        each="rank",
    )
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@backends
def test_each_router_uses_the_experts_of_its_tokens_and_layer(ranks: list[dict[str, Any]], backend: str) -> None:
    for name, layers in LAYERS.items():
        if name == NEW and f"{name}, {backend}" not in ranks[0]:
            continue
        for rank, own in zip(ranks, layers, strict=True):
            found = rank[f"{name}, {backend}"]
            assert found["right"] == dict.fromkeys(own, True), name
            assert found["plans"] == ["planned" if backend == "patch" else "cannot_be"], name


@backends
def test_routers_of_multi_token_prediction_are_trained_and_given_none(
    ranks: list[dict[str, Any]], backend: str
) -> None:
    """Three steps of two micro-batches; they lie on the last stage."""
    for name in (name for name in LAYERS if "prediction" in name and f"{name}, {backend}" in ranks[0]):
        first, last = (rank[f"{name}, {backend}"] for rank in ranks)
        assert first["predicted"] == [0, True, []], name
        assert last["predicted"] == [6, True, []], name
        assert last["trained"] == [True], name
