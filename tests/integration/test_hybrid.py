"""Hybrid models of real Megatron: routes get to the MoE layers that they are of, by either count of layers."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.megatron

MODES = ("none", "uniform", "block", "moe")
CALLS = {"none": [1, 1, 1], "uniform": [2, 2, 2], "block": [2, 1, 1], "moe": [2, 2, 2]}
NEW = "latent experts"
"""Only a HybridModel has them; up to 0.17 there is a MambaModel, which recomputes no whole layers."""
BLOCKS = "[1, 3, 7], those of the hybrid model 'ME*E-M*E'"
PAIRS = "[3, 5, 7], those of the hybrid model '*-*EME*E', nor [1, 2, 3], with one number for two letters"
REFUSED = {
    "a layer too few": f"sample 0: MoE layers [1, 3] of its trace are not {BLOCKS}",
    "a layer moved": f"sample 0: MoE layers [1, 3, 6] of its trace are not {BLOCKS}",
    "pairs for blocks": f"sample 0: MoE layers [0, 1, 3] of its trace are not {BLOCKS}",
    "one pair moved": f"sample 0: MoE layers [0, 2, 3] of its trace are not {PAIRS}",
    "pairs of a deeper model": "sample 0: num_layers (8) of its trace's model != 4",
    "blocks of a deeper model": "sample 0: num_layers (16) of its trace's model != 8",
}


@pytest.fixture(scope="module", params=["patch", "native"])
def said(request: pytest.FixtureRequest, tell: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """What a model said of its cases, with one back end."""
    (found,) = tell(["hybrid_replay.py", request.param])
    assert found["backend"] == request.param
    return found


def test_each_router_uses_the_experts_of_its_tokens_and_layer(said: dict[str, Any]) -> None:
    assert said["plan"] == ("planned" if said["backend"] == "patch" else "cannot_be")
    for mode in MODES if NEW in said else ("none", "moe"):
        assert said[f"blocks, recompute {mode}"] == [[1, 3, 7], CALLS[mode], [True] * 3], mode
    for numbers in ("pairs", "pairs by the model's numbers"):
        assert said[numbers] == [[3, 5, 7], [1] * 3, [True] * 3]


def test_own_routes_change_no_bit(said: dict[str, Any]) -> None:
    modes = MODES if NEW in said else ("none", "moe")
    assert [said[f"own routes, recompute {mode}"] for mode in modes] == [True] * len(modes)


def test_layers_behind_gated_delta_nets_use_theirs(said: dict[str, Any]) -> None:
    """In a GPTModel as Qwen3-Next is, in plain torch; in a hybrid model where it has a letter for them."""
    for mode in MODES:
        calls = [*CALLS[mode], CALLS[mode][-1]] if mode != "block" else [2, 2, 1, 1]
        assert said[f"gated, recompute {mode}"] == [[0, 1, 2, 3], calls, [True] * 4], mode
        assert said[f"own routes, gated, recompute {mode}"] is True, mode
    if "gated, hybrid" in said:
        assert said["gated, hybrid"] == [[1, 3, 5], [1] * 3, [True] * 3]


def test_latent_experts_are_routed_before_their_projection(said: dict[str, Any]) -> None:
    if NEW not in said:
        pytest.skip("the hybrid model of this Megatron-core has none")
    assert said["latent experts"] == [[1, 3, 7], [1] * 3, [True] * 3]
    assert said["own routes, latent experts"] is True


def test_other_layers_are_refused(said: dict[str, Any]) -> None:
    assert {name: said[name] for name in REFUSED} == {name: f"ReplayError: {text}" for name, text in REFUSED.items()}
    assert said["pairs of their model"] == said["blocks of their model"] == "done"
