"""What is wrong on one rank stops the step on all of them, with a message that says where: nobody is left waiting."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.rollout import Sample, save_samples

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

OPTIONS = (
    "moe_router_force_load_balancing",
    "moe_expert_capacity_factor",
    "moe_enable_routing_replay",
    "cuda_graph_impl",
    "batch_p2p_comm",
)

# Place and both operands.
MESSAGES = {
    "another token": r"rank 1: TraceError: rank 1, micro-batch 1: .*sample 1.*position 5",
    "shifted by one": r"rank 1: TraceError: rank 1, micro-batch 1: .*sample 1.*position 0",
    "too long": r"rank 1: LayoutError: rank 1, micro-batch 1: trace of \d+ tokens > padded length \(\d+\) of sample 1",
    "another layer map": r"rank 1, micro-batch 1: layer_ids \[1, .*\] of sample 1 != \[0, .*\] of sample 0",
    "fewer layers": r"rank 1, micro-batch 1: layer_ids \[0, .*\] of sample 1 != \[0, .*\] of sample 0",
    "fewer experts a token": r"sample 1: \(experts, top-k\) \(32, 3\) of its trace != \(32, 4\) of layer 0",
    "another model": r"sample 1: \(experts, top-k\) \(64, 4\) of its trace != \(32, 4\) of layer 0",
    "stale weights": r"micro-batch 1: sample 1, position 7: row of weights 'older' != 'default'",
    "too few traces": r"rank 1: LayoutError: rank 1, micro-batch 0: 1 traces != 2 samples",
    "another packing": r"rank 1: \w+: rank 1, micro-batch 0: .*",
    "another replay": r"rank 1: ReplayError: ENABLE_ROUTING_REPLAY \('1'\) != '0'",
    **{option: rf"rank 1: ReplayError: layer 0: {option} \(" for option in OPTIONS},
}


@pytest.fixture(scope="module")
def said(
    checkpoint: Path, perturbed: list[Sample], tell: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each case raised on each rank."""
    folder = tmp_path_factory.mktemp("guards")
    save_samples(folder / "samples", perturbed)
    arguments = [str(checkpoint), str(folder / "samples"), str(folder / "rendezvous")]
    return tell(*(["replay_guards.py", *arguments, str(rank)] for rank in range(2)))


def test_every_case_has_a_message(said: list[dict[str, Any]]) -> None:
    assert set(said[0]) == {*MESSAGES, "stale, live", "stale, keep", "nothing"}


@pytest.mark.parametrize("case", MESSAGES)
def test_all_ranks_raise_and_name_the_one_that_is_wrong(said: list[dict[str, Any]], case: str) -> None:
    assert said[0][case].startswith("ReplayError: rank 1: ")
    assert re.search(MESSAGES[case], said[0][case])
    assert said[0][case] == said[1][case]


def test_stale_rows_are_kept_or_routed_live_as_the_policy_says(said: list[dict[str, Any]]) -> None:
    """Of rank 1's second micro-batch one row is stale; nothing else changes."""
    clean = said[1]["nothing"]
    replayed, live, _ = clean[1]
    assert said[1]["stale, keep"] == [clean[0], [replayed, live, 1], *clean[2:]]
    assert said[1]["stale, live"] == [clean[0], [replayed - 1, live + 1, 1], *clean[2:]]
    assert said[0]["stale, keep"] == said[0]["stale, live"] == said[0]["nothing"]


def test_a_refused_step_leaves_nothing_behind(said: list[dict[str, Any]], perturbed: list[Sample]) -> None:
    """The last case is whole: after all the errors it is prepared as if there had been none."""
    batches = said[0]["nothing"] + said[1]["nothing"]
    assert sum(replayed for replayed, _, _ in batches) == sum(s.trace.num_tokens - 1 for s in perturbed)
    assert all(live == 0 for _, live, _ in batches)
    assert all(stale == 0 for _, _, stale in batches)
