"""Models that somebody else has changed: where routes would not reach the routers, the step stops and says where."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.megatron

METHODS = {
    "model": "GPTModel.forward",
    "block": "TransformerBlock.forward",
    "layer": "layer 1: TransformerLayer.forward",
    "layer's MLP": "layer 1: TransformerLayer._forward_mlp",
    "MoE layer": "layer 1: MoELayer.forward",
    "route": "layer 1: MoELayer.route",
    "router": "layer 1: TopKRouter.forward",
    "routing": "layer 1: TopKRouter.routing",
}
PATCHED = "(__main__.swallower.<locals>.patched)"
SWALLOWS = (
    f"{PATCHED} does not name routed_experts and would swallow it, as any argument that it does not know: take that "
    "patch off, or let it name the argument and hand it on"
)
TAKES_NONE = "takes no routed_experts; is megatron-core patched (`r3 patch verify`), and by nothing else?"
UNUSED = (
    "used the experts given to it in 0 of 2 rows: something between its forward and topk_routing_with_score_function "
    "drops routed_experts"
)


def unused_by_all(name: str) -> str:
    """Return what the first pass says if no router used its rows."""
    layers = "; ".join(f"layer {layer}: 0 rows in 1 calls" for layer in (1, 2, 3))
    return (
        f"forward: ReplayError: rank 0: {name} was handed routed_experts of 32 rows, and its routers used them "
        f"otherwise ({layers}): something on the way drops or changes them"
    )


MESSAGES = {
    **{f"swallowed, {stage}": f"prepare: ReplayError: {method} {SWALLOWS}" for stage, method in METHODS.items()},
    **{
        f"swallowed by wraps, {stage}": f"prepare: ReplayError: layer 1: TopKRouter {UNUSED}"
        if stage in ("router", "routing")
        else unused_by_all("GPTModel")
        for stage in METHODS
    },
    **{
        f"released, {stage}": f"prepare: ReplayError: {METHODS[stage]} (__main__.narrow.<locals>.released) {TAKES_NONE}"
        for stage in ("model", "router", "routing")
    },
    "swallowed, selection": f"prepare: ReplayError: layer 1: TopKRouter {UNUSED}",
    "on the instance, router": f"prepare: ReplayError: layer 2: TopKRouter {UNUSED}",
    "on the instance, block": unused_by_all("GPTModel"),
    "on the instance, model": unused_by_all("GPTModel"),
    "OwnRouter": f"prepare: ReplayError: layer 1: OwnRouter {UNUSED}",
    "Shifted": f"prepare: ReplayError: layer 1: Shifted {UNUSED}",
    "wrapper drops": unused_by_all("Wrapper"),
    "named wrapper drops": unused_by_all("NamedWrapper"),
    "narrow wrapper": f"prepare: ReplayError: NarrowWrapper.forward (__main__.NarrowWrapper.forward) {TAKES_NONE}",
    "wrapper outside drops": "next prepare: ReplayError: GPTModel: 1 training passes since its first routes were "
    "prepared were handed no routed_experts: pass it on, also through wrappers; if it is left out on purpose, say so "
    "with routed_live",
    "after it is replaced": f"prepare: ReplayError: {METHODS['routing']} {SWALLOWS}",
    "replaced on the instance later": unused_by_all("GPTModel"),
}
RIGHT = [
    *(f"right, recompute {kind}" for kind in ("none", "uniform", "block", "moe")),
    *(f"right, {kind}" for kind in ("jitter", "bias", "wrapped")),
    *(f"honest, {stage}" for stage in METHODS),
    "before it is replaced",
    "after it is put back",
    "live on purpose",
]
UNCHANGED = ("bits after the first pass", "generator", "mode")


@pytest.fixture(scope="module")
def said(tell: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """Where each model was stopped, and why."""
    (found,) = tell(["replay_swallowed.py"])
    return found


def test_every_case_has_a_message(said: dict[str, Any]) -> None:
    assert set(said) == {*MESSAGES, *RIGHT, *UNCHANGED}


@pytest.mark.parametrize("case", MESSAGES)
def test_routes_that_would_be_swallowed_stop_the_step(said: dict[str, Any], case: str) -> None:
    assert said[case] == MESSAGES[case]


@pytest.mark.parametrize("case", RIGHT)
def test_a_model_that_uses_them_goes_on_and_keeps_no_hook(said: dict[str, Any], case: str) -> None:
    assert said[case] == "done, 0 hooks"


@pytest.mark.parametrize("case", UNCHANGED)
def test_looking_changes_nothing(said: dict[str, Any], case: str) -> None:
    assert said[case] is True
