"""Replay in the passes of Megatron-LM's RL loop: the policy's replay, all others do as they did."""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from r3_adapter.errors import CaptureError, ReplayError, TraceError
from r3_adapter.frameworks.megatron_rl import Recorded, Shape, check_arguments, take_recorded, trace_of_row
from r3_adapter.trace import NOT_CAPTURED

SHAPE = Shape(np.array([1, 3], np.int32), 8, 2)
TURNS = ([5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11])


def routes(num_tokens: int, first: int) -> np.ndarray[Any, Any]:
    """Return [num_tokens - 1, 2, 2] expert ids that tell the turn that they are of."""
    return np.tile(np.array([first, first + 1], np.int16), (num_tokens - 1, 2, 1))


def episode() -> tuple[Any, dict[str, Recorded | None]]:
    """Return a rollout of two turns, the second with the first one's tokens before its own, and what was recorded."""
    recorded = {
        name: Recorded(np.array(tokens, np.int32), routes(len(tokens), first))
        for name, tokens, first in zip("ab", TURNS, (0, 4), strict=True)
    }
    rollout = SimpleNamespace(trajectory=[list(turn) for turn in TURNS], completion_ids=["a", "b"], env_id="e")
    return rollout, dict(recorded)


def test_a_row_has_each_tokens_route_of_the_turn_that_fed_it_first() -> None:
    rollout, recorded = episode()
    trace = trace_of_row(rollout, recorded, SHAPE)
    assert trace.token_ids.tolist() == TURNS[1]
    # The first turn's last token was fed by the second one, the second's by none.
    assert trace.topk_ids[:, 0, 0].tolist() == [0, 0, 0, 4, 4, 4, 0]
    assert trace.version_ids.tolist() == [0] * 6 + [NOT_CAPTURED]
    assert trace.layer_ids.tolist() == [1, 3] and trace.num_experts == 8
    alone = trace_of_row((rollout, 1), recorded, SHAPE)
    assert alone.topk_ids[:, 0, 0].tolist() == [4] * 6 + [0]


def test_padding_and_tokens_behind_a_request_have_no_routes() -> None:
    assert trace_of_row(None, {}, SHAPE).num_tokens == 0
    rollout, recorded = episode()
    rollout.trajectory[1].append(2)
    assert trace_of_row(rollout, recorded, SHAPE).version_ids.tolist() == [0] * 6 + [NOT_CAPTURED] * 2


def test_routes_that_are_missing_or_of_others_are_refused() -> None:
    def refuses(kind: type[Exception], said: str, name: str, found: Recorded | None) -> None:
        rollout, recorded = episode()
        with pytest.raises(kind, match=said):
            trace_of_row(rollout, {**recorded, name: found}, SHAPE)

    tokens = np.array(TURNS[1], np.int32)
    refuses(CaptureError, "request b, turn 1: the engine recorded no routes", "b", Recorded(tokens, None))
    refuses(CaptureError, "request a, turn 0: the engine recorded no routes", "a", None)
    refuses(
        TraceError, "request b, turn 1: its 7 tokens are not the first ones", "b", Recorded(tokens + 1, routes(7, 4))
    )
    refuses(TraceError, r"request b, turn 1: routes \(5, 2, 2\) != \(6, 2, 2\)", "b", Recorded(tokens, routes(6, 4)))
    refuses(TraceError, "request b, turn 1: expert 7 or 8 outside 0 to 7", "b", Recorded(tokens, routes(7, 7)))
    rollout, recorded = episode()
    rollout.completion_ids.pop()
    with pytest.raises(CaptureError, match="a rollout of 'e': 1 requests != 2 turns"):
        trace_of_row(rollout, recorded, SHAPE)


def test_what_a_request_has_recorded_is_taken_from_it() -> None:
    request = SimpleNamespace(prompt_tokens=np.array([5, 6]), generated_tokens=[7, 8], routing_indices=routes(4, 0))
    found = take_recorded(request)
    assert found.token_ids.tolist() == TURNS[0] and found.routes is not None and found.routes.shape == (3, 2, 2)
    assert request.routing_indices is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("moe_enable_routing_replay", False, "--moe-enable-routing-replay is off"),
        ("rl_use_sequence_packing", True, "--rl-use-sequence-packing"),
        ("cuda_graph_impl", "local", "--cuda-graph-impl local != none"),
        ("virtual_pipeline_model_parallel_size", 2, "virtual pipeline stages"),
    ],
)
def test_arguments_that_lose_routes_are_refused(name: str, value: Any, said: str) -> None:
    args = SimpleNamespace(
        moe_enable_routing_replay=True,
        rl_use_sequence_packing=False,
        cuda_graph_impl="none",
        virtual_pipeline_model_parallel_size=None,
    )
    check_arguments(args)  # type: ignore[arg-type]
    setattr(args, name, value)
    with pytest.raises(ReplayError, match=said):
        check_arguments(args)  # type: ignore[arg-type]


@pytest.mark.megatron
@pytest.mark.skipif(find_spec("megatron") is None, reason="no Megatron-core")
def test_the_policys_passes_replay_and_no_others(tell: Callable[..., list[dict[str, Any]]]) -> None:
    (said,) = tell(["megatron_rl_passes.py"])
    total = said["policy"][1]
    for name in ("policy", "training", "training again"):
        assert said[name] == [total, total], name
    for name in ("reference", "outside"):
        assert said[name][0] < total / 2 and said[name][1] == total, name
    assert said["passed on"] == ["statistics", 0] and said["gradient"]
    # The engine goes on recording.
    assert said["actions"] == ["RouterReplayAction.RECORD"]
    assert "token" in said["swapped"] and "of the trace of sample 0" in said["swapped"]
