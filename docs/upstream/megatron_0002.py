"""Megatron-core's own replay takes an expert twice, too many experts, and rows of another batch, in silence."""

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function as route
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

replay, logits = RouterReplay(), torch.randn(4, 8)
replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
for name, ids in (("an expert twice", [3, 3]), ("one too many", [1, 2, 3]), ("one too few", [5])):
    replay.set_target_indices(torch.tensor([ids] * 4))
    _, routing_map = route(logits, 2, router_replay=replay)
    print(f"{name}: top-k 2, experts a token: {routing_map.sum(dim=1).tolist()}, no error")
_, again = route(torch.randn(4, 8), 2, router_replay=replay)
print(f"the next micro-batch, not told of any routes: uses those of the last one: {torch.equal(again, routing_map)}")
