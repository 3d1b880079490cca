"""The aux loss balances the router's own top-k, whatever experts are replayed."""

import torch
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from megatron_router import make_router

options = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_enable_routing_replay": True}
router, grads = make_router(num_experts=4, **options), []
hidden = torch.randn(8, 1, 8)
router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
for ids in ([0, 1], [2, 3]):  # all tokens to two experts, then all to the other two
    router.router_replay.set_target_indices(torch.tensor([ids] * 8))
    router.weight.grad = None
    probs, _ = router(hidden)
    (probs * 0).sum().backward()  # what is left is the gradient of the aux loss
    grads.append(router.weight.grad.clone())
print(f"opposite loads, the same gradient of the aux loss: {torch.equal(*grads)}")
