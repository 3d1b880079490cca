"""The counts that drive the expert bias mask experts in place of tokens; with as many tokens as experts, in silence."""

import torch
from megatron_router import make_router

router = make_router(num_experts=4, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
padding = torch.tensor([False, False, True, True])  # of four tokens, two are padding
routing_map = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.bool)
router._apply_expert_bias(routing_map, padding_mask=padding)
want = (routing_map & ~padding[:, None]).sum(dim=0)
print(f"tokens by expert without padding: {want.tolist()}; counted: {router.local_tokens_per_expert.tolist()}")
