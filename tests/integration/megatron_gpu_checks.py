"""Run with the patched Megatron: the fused router for given experts in a CUDA graph whose ids change, and its waits.

Without a GPU, in a rehearsal with TRITON_INTERPRET=1, the graph is the call itself.
"""

from collections.abc import Callable

import pytest
import torch
from megatron.core.fusions.fused_routed_experts import can_fuse_routed_experts, fused_topk_with_routed_experts
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOKENS, EXPERTS, TOPK = (8192, 128, 8) if GPU else (64, 16, 4)
Found = tuple[torch.Tensor, ...]


def drawn(seed: int, dtype: torch.dtype, live: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [T, E] logits and [T, K] ids of experts, with -1 in each third row where some are live."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(TOKENS, EXPERTS, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1)[:, :TOPK].to(dtype)
    if live:
        ids[::3] = -1
    return logits.to(DEVICE), ids.to(DEVICE)


def step(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Found:
    """Return probabilities, map and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    probs, routing_map = fused_topk_with_routed_experts(leaf, ids)
    (gradient,) = torch.autograd.grad(probs, leaf, weights)
    return probs.detach(), routing_map, gradient


def captured(call: Callable[[], Found]) -> Callable[[], Found]:
    """Return a replay of a call, which reads the tensors that the call has read."""
    if not GPU:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = call()

    def replay() -> Found:
        graph.replay()
        torch.cuda.synchronize()
        return tuple(each.clone() for each in found)

    return replay


@pytest.mark.parametrize(("dtype", "live"), [(torch.uint8, False), (torch.int16, True)], ids=["given", "some live"])
def test_ids_change_between_replays_of_a_graph(dtype: torch.dtype, live: bool) -> None:
    """Bit for bit what the same call gives without a graph; the map is that of the unfused router."""
    logits, ids = drawn(0, dtype, live)
    weights = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    assert can_fuse_routed_experts(logits)
    replay = captured(lambda: step(logits, ids, weights))
    maps = []
    for seed in (1, 2):
        others = drawn(seed, dtype, live)
        logits.copy_(others[0])
        ids.copy_(others[1])
        have, want = replay(), step(*others, weights)
        assert [torch.equal(one, other) for one, other in zip(have, want, strict=True)] == [True] * 3
        assert torch.equal(have[1], topk_routing_with_score_function(others[0], TOPK, routed_experts=others[1])[1])
        maps.append(have[1])
    assert not torch.equal(*maps)


def test_the_host_waits_for_nothing() -> None:
    logits, ids = drawn(3, torch.int16, live=True)
    weights = torch.ones_like(logits)
    step(logits, ids, weights)
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits, ids, weights)
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
