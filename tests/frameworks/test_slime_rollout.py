"""slime's samples become training data that carries their routes, or an error says which sample and why."""

import asyncio
import sys
from argparse import Namespace
from dataclasses import make_dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError, ReplayError, TraceError
from r3_adapter.frameworks.rows import from_int32, moe_of_arguments, to_int32
from r3_adapter.frameworks.slime.batches import traces_of
from r3_adapter.frameworks.slime.rollout import ROUTES, ask_for_routes, convert, generate
from r3_adapter.trace import RoutingTrace

LAYERS, EXPERTS, TOPK = 4, 300, 2


def arguments(**options: Any) -> Namespace:
    return Namespace(
        **{
            "num_layers": LAYERS,
            "num_experts": EXPERTS,
            "moe_router_topk": TOPK,
            "moe_layer_freq": [0, 1, 0, 1],
            "use_routing_replay": False,
            "use_rollout_routing_replay": False,
            "custom_reward_post_process_path": None,
            "reward_scale": 2.0,
            **options,
        }
    )


def rows(num_tokens: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return routes as upstream's reply has them: [S - 1, L, K] int32, 0 in dense layers."""
    rng = np.random.default_rng(seed)
    found = rng.random((num_tokens - 1, LAYERS, EXPERTS)).argsort(2)[..., :TOPK].astype(np.int32)
    found[:, ::2] = 0
    return found


@pytest.fixture
def framework(slimelike: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "slime.ray.rollout", slimelike)
    return slimelike


def samples(framework: ModuleType) -> list[Any]:
    return [
        framework.Sample([5, 6, 7, 8], 2, index=10, rollout_routed_experts=rows(4), weight_versions=["3"]),
        framework.Sample([9, 5, 4, 1, 2], 3, index=11, rollout_routed_experts=rows(5, 1), weight_versions=["3", "4"]),
    ]


def test_routes_reach_the_trainer_through_the_keys_that_survive(framework: ModuleType) -> None:
    made = samples(framework)
    data = convert(arguments(), made)
    own = framework.share_out(data, [1, 0], [[0, 1]])
    traces = traces_of(own)
    for trace, sample in zip(traces, reversed(made), strict=True):
        assert trace.token_ids.tolist() == sample.tokens
        assert trace.layer_ids.tolist() == [1, 3] and trace.num_experts == EXPERTS
        assert np.array_equal(trace.topk_ids[:-1], sample.rollout_routed_experts[:, [1, 3]])
        assert trace.captured.tolist() == [True] * (len(sample.tokens) - 1) + [False]
    assert [trace.weight_versions for trace in traces] == [("3, 4",), ("3",)]
    # Once read, they are kept: a second pass of the same data reads them no more.
    assert all(again is first for again, first in zip(traces_of(own), traces, strict=True))
    assert data["rewards"] == [sample.reward * 2 for sample in made]


def test_the_engines_own_payload_is_taken_too(framework: ModuleType) -> None:
    plain = convert(arguments(), samples(framework))
    made = samples(framework)
    made[0].rollout_routed_experts = from_int32(plain[ROUTES][0], place="x").to_bytes()
    made[1].rollout_routed_experts = from_int32(plain[ROUTES][1], place="x")
    again = convert(arguments(), made)
    for first, second in zip(plain[ROUTES], again[ROUTES], strict=True):
        assert from_int32(first, place="x") == from_int32(second, place="x")


def _spoilt(made: list[Any], how: str) -> None:
    sample = made[1]
    routes = sample.rollout_routed_experts
    if how == "none":
        sample.rollout_routed_experts = None
    elif how == "a row too few":
        sample.rollout_routed_experts = routes[:-1]
    elif how == "another model":
        sample.rollout_routed_experts = routes[:, :3]
    elif how == "twice":
        routes[2, 3] = 7
    elif how == "out of range":
        routes[2, 3, 1] = EXPERTS
    elif how == "dense":
        routes[0, 2, 0] = 1
    elif how == "floats":
        sample.rollout_routed_experts = routes.astype(np.float32)
    else:
        sample.rollout_routed_experts = RoutingTrace.from_bytes(from_int32(convert_alone(sample), place="x").to_bytes())
        sample.tokens = [*sample.tokens[:2], 77, *sample.tokens[3:]]


def convert_alone(sample: Any) -> Any:
    return convert(arguments(), [sample])[ROUTES][0]


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("none", CaptureError, r"sample 1 \(index 11\): no routes; start the engines"),
        ("a row too few", CaptureError, r"sample 1 \(index 11\): routes of int32, shape \[3, 4, 2\] != .*\[4, 4, 2\]"),
        ("another model", CaptureError, r"shape \[4, 3, 2\] != .*\[4, 4, 2\]"),
        ("twice", TraceError, r"sample 1 \(index 11\): topk_ids at token 2, layer 3: \[7, 7\]"),
        ("out of range", CaptureError, r"expert 300 at token 2, layer 3 outside 0 to num_experts \(300\)"),
        ("dense", CaptureError, r"layer 2 has routes, but the MoE layers are \[1, 3\]"),
        ("floats", CaptureError, r"routes of float32"),
        ("other tokens", CaptureError, r"routes of token id 4 != 77 at token 2"),
    ],
)
def test_routes_that_do_not_fit_are_refused(framework: ModuleType, how: str, error: type[Exception], says: str) -> None:
    made = samples(framework)
    _spoilt(made, how)
    kept = [sample.rollout_routed_experts for sample in made]
    with pytest.raises(error, match=says):
        convert(arguments(), made)
    assert all(sample.rollout_routed_experts is routes for sample, routes in zip(made, kept, strict=True))


def test_a_framework_that_replays_itself_is_refused(framework: ModuleType) -> None:
    for flag in ("use_routing_replay", "use_rollout_routing_replay"):
        with pytest.raises(ReplayError, match=f"--{flag.replace('_', '-')} is on"):
            convert(arguments(**{flag: True}), samples(framework))


def test_generate_asks_for_routes(slimelike: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    async def theirs(args: Namespace, sample: Any, sampling_params: dict[str, Any]) -> Any:
        return args.use_rollout_routing_replay, sample, sampling_params

    monkeypatch.setitem(sys.modules, "slime.rollout.sglang_rollout", SimpleNamespace(generate=theirs))
    args, sample = arguments(), slimelike.Sample([1], 0)
    assert asyncio.run(generate(args, sample, {"top_p": 1.0})) == (True, sample, {"top_p": 1.0})
    assert not args.use_rollout_routing_replay


def test_an_engine_without_patches_is_refused(framework: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """slime would leave `routed_experts_format` out, and take the released engine's rows."""
    engine = SimpleNamespace(__file__="server_args.py", ServerArgs=make_dataclass("ServerArgs", ["dtype"]))
    monkeypatch.setitem(sys.modules, "sglang.srt.server_args", engine)
    for run in (lambda: convert(arguments(), samples(framework)), lambda: ask_for_routes(arguments())):
        with pytest.raises(ReplayError, match=r"server_args\.py: this SGLang is not patched"):
            run()
    engine.ServerArgs = make_dataclass("ServerArgs", [("routed_experts_format", str, "flat")])
    convert(arguments(), samples(framework))


def test_damage_on_the_way_is_seen() -> None:
    trace = RoutingTrace(
        topk_ids=np.array([[[1, 2]], [[0, 0]]], np.uint8),
        token_ids=np.array([4, 5], np.int32),
        version_ids=np.array([0, -1], np.int32),
        layer_ids=np.array([0], np.int32),
        num_experts=8,
        weight_versions=("1",),
    )
    array = to_int32(trace)
    assert from_int32(array, place="x") == trace
    for at in range(len(array)):
        spoilt = array.copy()
        spoilt[at] ^= 1 << 9
        with pytest.raises(TraceError, match="rank 3"):
            from_int32(spoilt, place="rank 3")
    for wrong in (array.astype(np.int64), array[:1], array.reshape(1, -1), np.zeros(4, np.int32)):
        with pytest.raises(TraceError, match="rank 3"):
            from_int32(wrong, place="rank 3")


def test_moe_layers_are_megatrons() -> None:
    assert moe_of_arguments(arguments(moe_layer_freq=2)).layer_ids == (0, 2)
    assert moe_of_arguments(arguments(moe_layer_freq=1)).layer_ids == (0, 1, 2, 3)
    for wrong in ([0, 1], [0, 2, 1, 1], [0, 0, 0, 0], 0, "1"):
        with pytest.raises(ReplayError, match="moe_layer_freq"):
            moe_of_arguments(arguments(moe_layer_freq=wrong))
    with pytest.raises(ReplayError, match=r"num_experts \(None\)"):
        moe_of_arguments(arguments(num_experts=None))
