"""Dispatch by known counts: the bits are those without, no MoE layer exchanges counts, and no wrong plan passes."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.processes import run_together
from r3_adapter.proof.tiny import write_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

SCRIPT = Path(__file__).with_name("dispatch_rank.py")

OVERLAPPED = "ep 2, overlapped"
LAYOUTS: Mapping[str, tuple[dict[str, int], dict[str, Any]]] = {
    "ep 2": ({"ep": 2}, {}),
    "tp 2, ep 2, etp 2, recompute moe": ({"tp": 2, "ep": 2}, {"recompute": "moe"}),
    "ep 2, allgather, recompute full": (
        {"ep": 2},
        {"dispatcher": "allgather", "recompute": "full", "distributed_optimizer": True},
    ),
    OVERLAPPED: ({"ep": 2}, {"megatron_arguments": {"overlap_moe_expert_parallel_comm": True, "bf16": True}}),
}

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """Return what each rank of a layout found; a layout runs once."""

    @cache
    def found(name: str) -> Ranks:
        sizes, options = LAYOUTS[name]
        folder = tmp_path_factory.mktemp("dispatch")
        (folder / "model").mkdir()
        write_checkpoint(folder / "model", dtype="bfloat16" if name == OVERLAPPED else "float32", seed=1)
        ranks = range(ParallelLayout.smallest(**sizes).world_size)
        arguments = [str(folder), json.dumps(sizes), json.dumps(options)]
        run_together(
            [[sys.executable, str(SCRIPT), *arguments, str(rank)] for rank in ranks],
            env=[{"OMP_NUM_THREADS": "1"} for _ in ranks],
            timeout=400,
            what="trainer",
            each="rank",
        )
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in ranks]

    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_changes_no_bit_and_spares_an_exchange_in_each_layer(run: Callable[[str], Ranks], layout: str) -> None:
    """Losses, gradients and weights after the step; a rank enters one collective less in each MoE layer."""
    gathers = LAYOUTS[layout][1].get("dispatcher") == "allgather"
    for rank in run(layout):
        live, replay, plan = rank["live"], rank["replay"], rank["plan"]
        assert plan["digest"] == replay["digest"] != live["digest"]
        # By hooks on the chunks, in forward or in build_schedule_plan, inside of Megatron's data parallelism.
        assert (rank["attached"]["digest"], rank["attached"]["exchanges"]) == (plan["digest"], 0)
        assert not any(plan["why_not"][0]) and set(replay["why_not"][0]) == {"not asked for"}
        assert replay["exchanges"] == live["exchanges"] and plan["exchanges"] == 0
        assert (replay["exchanges"] > 0) != gathers
        if layout == OVERLAPPED:
            assert plan["digest"] == rank["in turns"]["digest"]
            continue
        assert plan["per_layer"] == replay["per_layer"] - (not gathers) == live["per_layer"] - (not gathers)
    assert run("ep 2")[0]["plan"]["per_layer"] == 3


def test_ranks_receive_as_many_tokens_as_their_budgets_say(run: Callable[[str], Ranks]) -> None:
    """Of each layer and micro-batch, with padding: the rows that a rank's experts were really given."""
    for rank in run("ep 2"):
        counted = [tokens for batch in rank["budgets"] for tokens in batch]
        assert rank["plan"]["received"] == rank["replay"]["received"] == counted
        assert len(set(counted)) > 2
        assert rank["live"]["received"] != counted


WRONG = {
    "plans changed places": r"^rank 0: ReplayError: rank 0: layer 0: .*; rank 1: ReplayError: rank 1: layer 0: ",
    "routes changed on rank 1": r"^rank 1: ReplayError: rank 1: layer 7: \d+ experts were sent other numbers of tokens",
    "a micro-batch less on rank 1": "^1 micro-batches on rank 1 != 2 on rank 0, for which it waits",
}


@pytest.mark.parametrize("case", WRONG)
def test_all_ranks_refuse_a_step_whose_plan_is_wrong(run: Callable[[str], Ranks], case: str) -> None:
    """None waits for another; a plan that is another's is found when the step has been made, before the weights are."""
    first, second = (rank[case] for rank in run("ep 2"))
    assert first == second and re.search(WRONG[case], first)


def test_routers_that_select_on_any_rank_leave_their_batch_without_a_plan(run: Callable[[str], Ranks]) -> None:
    for rank in run("ep 2"):
        first, *others = rank["a live row on rank 1"]["why_not"][0]
        assert first == "1 rows are routed live, on ranks [1] of the 2 of the expert group" and not any(others)
        assert 0 < rank["a live row on rank 1"]["exchanges"] < rank["replay"]["exchanges"]


def test_a_rank_that_plans_none_is_enough(run: Callable[[str], Ranks]) -> None:
    for rank, why in zip(run("ep 2"), ("another rank plans none", "not asked for"), strict=True):
        assert set(rank["rank 1 plans none"]["why_not"][0]) == {why}
        assert rank["rank 1 plans none"]["digest"] == rank["replay"]["digest"]
