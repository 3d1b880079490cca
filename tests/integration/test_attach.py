"""Hooks on a model hand routes to loops that know nothing of them: bit for bit what the argument does, or an error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.megatron

SCRIPT = Path(__file__).with_name("attached.py")
SAME = [
    *(f"recompute {each}{rows}" for each in ("none", "uniform", "block", "moe") for rows in ("", ", live rows")),
    "wrapper that drops the argument",
    "model of another kind",
]
NEXT = "rank 0: chunk 0, micro-batch"
ERRORS = {
    "two models in a chunk": "ReplayError: chunk 0: a ModuleList has no GPTModel inside, or several",
    "no model": "ReplayError: chunk 0: a Linear has no GPTModel inside, or several",
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


def say(backend: str) -> dict[str, Any]:
    """Run all cases with a back end."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), backend]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(json.loads(run.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What each case says where Megatron is patched."""
    return say("auto")


def test_gradients_are_those_of_the_argument_to_the_bit_and_the_model_is_left_as_it_was(said: dict[str, Any]) -> None:
    assert {name: said[name] for name in SAME} == {name: ["patch", True, True, True] for name in SAME}


def test_a_pass_that_does_not_fit_its_routes_stops_and_says_where(said: dict[str, Any]) -> None:
    errors = {name: text.format(backend="patch", other="native") for name, text in ERRORS.items()}
    assert {name: said[name] for name in errors} == errors
    assert {*said} == {*SAME, *ERRORS}
