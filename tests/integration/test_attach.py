"""Hooks on a model hand routes to loops that know nothing of them: bit for bit what the argument does, or an error."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.patch.packages import State

pytestmark = pytest.mark.megatron

HERE = Path(__file__).parent
AT_1 = "ReplayError: layer 1: backend 'native'"
ANOTHER = "ReplayError: rank 0: chunk 0: layer 1: another replay is active: its RouterReplay has action"
SAME = [
    *(f"recompute {each}{rows}" for each in ("none", "uniform", "block", "moe") for rows in ("", ", live rows")),
    "wrapper that drops the argument",
    "model of another kind",
]
NEXT = "rank 0: chunk 0, micro-batch"
ERRORS = {
    "two models in a chunk": "ReplayError: chunk 0: a ModuleList has no GPTModel or HybridModel inside, or several",
    "no model": "ReplayError: chunk 0: a Linear has no GPTModel or HybridModel inside, or several",
    "no sequence": "ReplayError: chunks: a GPTModel, not a sequence of model chunks",
    "a word": "ReplayError: backend 'nativ' is none of 'auto', 'patch', 'native'",
    "attached twice": "ReplayError: chunk 0: its GPTModel is attached already: detach it first",
    "another back end": (
        "ReplayError: rank 0: ReplayError: backend {other!r} != {backend!r}, with which the model is attached"
    ),
    "a pass too many": f"ReplayError: {NEXT} 3: no routes: the pass was given 3 micro-batches",
    "after it": "done",
    "a pass too few": (
        f"ReplayError: {NEXT} 2: routes left over: 2 forward passes were made of the 3 micro-batches that the pass was "
        "given"
    ),
    "no batch": "ReplayError: chunk 0, micro-batch 0: a NoneType is not a ReplayBatch",
    "two chunks": "ReplayError: steps: those of 2 chunks != 1 chunks that are attached",
    "an error of the loop": 'KeyError: "the loop\'s own"',
    "nested": "ReplayError: `replaying` inside of `replaying`: a pass has routes of one step",
    "detach inside": "ReplayError: detach inside of `replaying`",
    "outside": (
        "ReplayError: rank 0: chunk 0: a forward pass outside of `replaying`, with outside 'refuse'; if it is to be "
        "routed live, say so with routed_live"
    ),
    "outside, on purpose": "done",
    "an argument too": (
        f"ReplayError: {NEXT} 0: routed_experts as an argument of a model that is attached: hand its routes to "
        "`replaying`, or detach it"
    ),
    "after detach": "ReplayError: `replaying` after `detach`",
    "live after detach": "done",
}


NATIVE = {
    "patch": (
        "ReplayError: backend 'patch': GPTModel.forward takes no routed_experts; is megatron-core patched (`r3 patch "
        "verify`)?"
    ),
    "not attached": ("ReplayError: backend 'native' of a model that is not attached: attach(chunks, backend='native')"),
    "not attached, patch": (
        "ReplayError: GPTModel.forward (megatron.core.models.gpt.gpt_model.GPTModel.forward) takes no routed_experts; "
        "is megatron-core patched (`r3 patch verify`), and by nothing else?"
    ),
    "moe_router_fusion": (
        f"{AT_1}: moe_router_fusion (True) != False: the fused router does not ask RouterReplay, and selects for itself"
    ),
    "overlap_moe_expert_parallel_comm": (
        f"{AT_1}: overlap_moe_expert_parallel_comm (True) != False: layers of two micro-batches take turns in a "
        "schedule plan, and a router has one target"
    ),
    "moe_token_dispatcher_type": (
        f"{AT_1}: moe_token_dispatcher_type ('flex') != 'alltoall' or 'allgather': the flex dispatcher looks for "
        "experts by their weights, and loses those whose weight is 0"
    ),
    "aux losses": (
        f"{AT_1}: load balancing 'aux_loss' counts the experts that the router would select, not those that are "
        "replayed; if that is meant, attach with aux_losses='live'"
    ),
    "aux losses, live": "done",
    "bias": "done",
    "sinkhorn": "ReplayError: layer 1: load balancing 'sinkhorn' selects experts itself",
    "duplicate ids": "TraceError: topk_ids at token 0, layer 1: [3, 3] has 1 distinct ids != topk (2)",
    "another replay": f"{ANOTHER} RouterReplayAction.RECORD and 0 targets; turn off the training framework's own",
    "list of all routers is left alone": True,
    "another replay later": (
        f"{ANOTHER} RouterReplayAction.REPLAY_FORWARD and 0 targets; turn off the training framework's own"
    ),
    "targets of others": f"ReplayError: {NEXT} 0: targets that another replay has left: layer 2: 1",
    "after it": "done",
    "nothing is left": [True, True, True],
    "replaced later": "ReplayError: layer 2: its router_replay was replaced since the model was attached",
    "backward outside, recompute none": "done",
    "around the output, recompute none": "done",
    "backward outside, recompute uniform": (
        "ReplayError: rank 0: chunk 0: a backward pass with recomputation, outside of the `replaying` that its forward "
        "pass was in: with backend 'native' both must be inside"
    ),
    "around the output, recompute uniform": (
        f"ReplayError: {NEXT} 1: layer 2: its router works outside of the model's forward pass, and on gradients that "
        "did not come through the model's output"
    ),
    "multi-token prediction": "done",
    "its router is left alone": [True, True, True],
    "selection drops it": (
        "ReplayError: layer 1: TopKRouter used the experts given to it in 0 of 2 rows: something between its forward "
        "and topk_routing_with_score_function drops RouterReplay"
    ),
}


def say(script: str, *arguments: str, tree: Path) -> dict[str, Any]:
    """Run all cases of a script; tree: the Megatron to take in place of the installed one."""
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(json.loads(run.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def said(tell: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """What each case says where Megatron is patched."""
    (found,) = tell(["attached.py", "auto"])
    return found


@pytest.fixture(scope="module")
def released(trees: Mapping[State, Path]) -> dict[str, Any]:
    """What each case says where it is not."""
    return say("attached.py", "auto", tree=trees[State.NOT_APPLIED])


def test_gradients_are_those_of_the_argument_to_the_bit_and_the_model_is_left_as_it_was(said: dict[str, Any]) -> None:
    assert {name: said[name][:3] for name in SAME} == {name: ["patch", True, True] for name in SAME}


def test_megatrons_own_replay_makes_the_same_bits_where_it_is_not_patched(
    said: dict[str, Any], released: dict[str, Any]
) -> None:
    assert {name: released[name] for name in SAME} == {name: ["native", True, True, said[name][3]] for name in SAME}


@pytest.mark.parametrize("backend", ["patch", "native"])
def test_a_pass_that_does_not_fit_its_routes_stops_and_says_where(
    said: dict[str, Any], released: dict[str, Any], backend: str
) -> None:
    found = said if backend == "patch" else released
    other = "native" if backend == "patch" else "patch"
    errors = {name: text.format(backend=backend, other=other) for name, text in ERRORS.items()}
    assert {name: found[name] for name in errors} == errors
    assert {*found} == {*SAME, *ERRORS}


def test_what_megatrons_own_replay_gets_wrong_is_refused_by_name(trees: Mapping[State, Path]) -> None:
    assert say("attached_native.py", tree=trees[State.NOT_APPLIED]) == NATIVE
