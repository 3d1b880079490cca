"""Megatron-core's own replay is one list for the process: a second model makes the first one's data unusable."""

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

policy = [RouterReplay() for _ in range(2)]  # what the two MoE layers of a model make of themselves
RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
data = [torch.tensor([[0, 1]]), torch.tensor([[2, 3]])]
RouterReplay.set_replay_data(data)
reference = [RouterReplay() for _ in range(2)]  # a reference model in the same process
try:
    RouterReplay.set_replay_data(data)
except ValueError as error:
    print(f"data for the policy, once a reference model is there: {error}")
RouterReplay.clear_global_router_replay_instances()
RouterReplay.set_replay_data([])
print(f"after the list was cleared: no error, and the policy replays old rows: {policy[0].target_topk_idx.tolist()}")
