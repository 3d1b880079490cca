"""Run with the patched Megatron and TRITON_INTERPRET=1: the fused router for given experts against the unfused one."""

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.fusions.fused_routed_experts import can_fuse_routed_experts, fused_topk_with_routed_experts
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

DTYPES = (torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64)
ULP = 2**-23


def test_the_interpreter_stands_for_a_gpu() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert can_fuse_routed_experts(torch.empty(0))


@st.composite
def routers(draw: st.DrawFn) -> tuple[int, int, int, dict[str, object]]:
    """Tokens, experts, top-k and the router's options."""
    num_groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    num_experts = num_groups * draw(st.integers(2, 300 // num_groups))
    topk = draw(st.integers(1, min(16, num_experts)))
    options: dict[str, object] = {"scaling_factor": draw(st.sampled_from([None, 2.5]))}
    score = draw(st.sampled_from(["softmax", "pre_softmax", "sigmoid", "biased"]))
    if score == "pre_softmax":
        options["use_pre_softmax"] = True
    elif score != "softmax":
        options["score_function"] = "sigmoid"
        if score == "biased":
            options["expert_bias"] = torch.linspace(0.5, -0.5, num_experts)
    if num_groups > 1:
        # Each of the chosen groups has room for its share of the top-k.
        group_topk = draw(st.integers(1, num_groups))
        topk = group_topk * draw(st.integers(1, min(8 // group_topk, num_experts // num_groups)))
        options |= {"num_groups": num_groups, "group_topk": group_topk}
    return draw(st.integers(1, 12)), num_experts, topk, options


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(router=routers(), seed=st.integers(0, 2**31), ties=st.booleans(), data=st.data())
def test_fused_is_unfused(
    router: tuple[int, int, int, dict[str, object]], seed: int, ties: bool, data: st.DataObject
) -> None:
    """The map exactly; weights and gradients to the rounding of exp and of sums."""
    num_tokens, num_experts, topk, options = router
    fits = [dtype for dtype in DTYPES if torch.iinfo(dtype).max >= num_experts]
    dtype = data.draw(st.sampled_from(fits))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator) * 3
    logits = logits.round() if ties else logits
    experts = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :topk].to(dtype)
    repeated = torch.zeros(num_tokens, dtype=torch.bool)
    if topk > 1:
        repeated = torch.rand(num_tokens, generator=generator) < 0.1
        experts[:, 0] = torch.where(repeated, experts[:, 1].long(), experts[:, 0].long()).to(dtype)
    live = torch.zeros(num_tokens, dtype=torch.bool)
    if dtype.is_signed:
        live = torch.rand(num_tokens, generator=generator) < 0.4
        experts[live] = -1
    grad = torch.randn(num_tokens, num_experts, generator=generator)

    x, y = (logits.clone().requires_grad_() for _ in range(2))
    probs, routing_map = fused_topk_with_routed_experts(x, experts, **options)  # type: ignore[arg-type]
    probs.backward(grad)
    if ties and live.any():
        # torch.topk chooses among equal scores as it likes: the unfused router is given what the fused one chose.
        assert (routing_map.sum(dim=1) == topk).all()
        chosen = routing_map.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :topk]
        experts[live] = chosen[live].to(dtype)
    want, want_map = topk_routing_with_score_function(y, topk, routed_experts=experts, **options)  # type: ignore[arg-type]
    want.backward(grad)

    repeated &= ~live
    assert torch.equal(routing_map[~repeated], want_map[~repeated])
    assert routing_map[repeated].equal((torch.arange(num_experts) < topk).expand(int(repeated.sum()), -1))
    assert torch.equal(probs.isnan().any(dim=1), repeated)
    assert torch.equal(want.isnan().any(dim=1), repeated)
    error = (probs - want)[~repeated].abs()
    assert (error <= 12 * ULP * want[~repeated].abs()).all()
    largest = want.detach().nan_to_num().abs().amax(dim=1, keepdim=True) * grad.abs().amax(dim=1, keepdim=True)
    assert ((x.grad - y.grad).abs() <= 32 * ULP * largest).all()  # type: ignore[operator]
