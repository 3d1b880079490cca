"""What Megatron's own RouterReplay gets wrong, tried in a Megatron without our patches; print what each case says.

python attached_native.py
"""

import json
from typing import Any

import megatron_tiny as tiny
import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.moe import router as router_module
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.attach import Attached, attach
from r3_adapter.megatron.replay import ReplayBatch, prepare
from r3_adapter.trace import RoutingTrace

said, told = tiny.said, tiny.told
tiny.start()
torch.manual_seed(11)
TOKENS = torch.randint(0, tiny.VOCAB, (tiny.BATCH, tiny.SEQ))  # Those of megatron_tiny.forward.


def traces(ids: Any = None) -> list[RoutingTrace]:
    """Return routes of the micro-batch; random ones, or the same in all rows."""
    found = []
    for sample, tokens in enumerate(TOKENS.numpy().astype(np.int32)):
        noise = np.random.default_rng(sample).random((tiny.SEQ, tiny.MOE_LAYERS, tiny.EXPERTS))
        rows = np.argsort(noise, axis=2)[..., : tiny.TOPK].astype(np.uint8)
        if ids is not None:
            rows[:] = ids
        layers = np.arange(1, 4, dtype=np.int32)
        found.append(RoutingTrace(rows, tokens, np.zeros(tiny.SEQ, np.int32), layers, tiny.EXPERTS, ("v",)))
    return found


def ready(model: torch.nn.Module, ids: Any = None, backend: Any = "native") -> ReplayBatch:
    """Prepare the micro-batch."""
    return prepare(model, traces(ids), TOKENS, layout=ParallelLayout(), backend=backend)


def whole_step(model: torch.nn.Module, **options: Any) -> None:
    """Attach, prepare, run forward and backward, and detach."""
    attached = attach([model], "native", **options)
    try:
        with attached.replaying([[ready(model)]]):
            tiny.forward(model).mean().backward()
    finally:
        attached.detach()


told("patch", lambda: attach([tiny.build()], "patch"))
told("not attached", lambda: ready(tiny.build()))
told("not attached, patch", lambda: ready(tiny.build(), backend="patch"))
for option, value in {
    "moe_router_fusion": True,
    "overlap_moe_expert_parallel_comm": True,
    "moe_token_dispatcher_type": "flex",
}.items():
    model = tiny.build()
    setattr(model.config, option, value)
    told(option, lambda model=model: whole_step(model))  # type: ignore[misc]
told("aux losses", lambda: whole_step(tiny.build(**tiny.ROUTERS["aux_loss"])))
told("aux losses, live", lambda: whole_step(tiny.build(**tiny.ROUTERS["aux_loss"]), aux_losses="live"))
told("bias", lambda: whole_step(tiny.build(**tiny.ROUTERS["groups"])))
told("sinkhorn", lambda: whole_step(tiny.build(moe_router_load_balancing_type="sinkhorn")))
told("duplicate ids", lambda: traces([3, 3]))

model = tiny.build(moe_enable_routing_replay=True)
RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
told("another replay", lambda: whole_step(model))
RouterReplay.clear_global_router_replay_action()
number = len(RouterReplay.global_router_replay_instances)
attached = attach([model], "native")
batch = ready(model)
said["list of all routers is left alone"] = number == len(RouterReplay.global_router_replay_instances) == 3
RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def one_pass(attached: Attached, model: torch.nn.Module) -> torch.Tensor:
    """Run forward, and leave the backward pass to the caller."""
    with attached.replaying([[batch]]):
        return tiny.forward(model)


told("another replay later", lambda: one_pass(attached, model))
RouterReplay.clear_global_router_replay_action()


def foreign() -> None:
    """Let somebody else set targets in the midst of a pass."""
    with attached.replaying([[batch]]):
        tiny.forward(model).mean().backward()
        tiny.routers(model)[1].router_replay.set_target_indices(torch.zeros(1))


told("targets of others", foreign)
told("after it", lambda: one_pass(attached, model).mean().backward())
said["nothing is left"] = [
    router.router_replay.target_topk_idx is None and not router.router_replay.replay_backward_list
    for router in tiny.routers(model)
]
tiny.routers(model)[1].router_replay = None
told("replaced later", lambda: ready(model))

for recompute in ("none", "uniform"):
    model = tiny.build(**tiny.RECOMPUTE[recompute])
    attached = attach([model], "native")
    batch = ready(model)
    losses = one_pass(attached, model)
    told(f"backward outside, recompute {recompute}", lambda losses=losses: losses.mean().backward())  # type: ignore[misc]
    with attached.replaying([[batch]]):
        inner: list[torch.Tensor] = []
        hook = model.decoder.register_forward_hook(lambda *call, inner=inner: inner.append(call[2]))
        tiny.forward(model)
        hook.remove()
        told(f"around the output, recompute {recompute}", lambda inner=inner: inner[0].sum().backward())  # type: ignore[misc]


def with_prediction() -> torch.nn.Module:
    """Build a model with a layer of multi-token prediction, whose router Megatron lists with the others."""
    config = tiny.build(mtp_num_layers=1, moe_enable_routing_replay=True).config
    RouterReplay.clear_global_router_replay_instances()
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    return GPTModel(config, spec, tiny.VOCAB, tiny.SEQ, position_embedding_type="rope", mtp_block_spec=mtp).train()


model = with_prediction()
(own,) = [module.router_replay for name, module in model.named_modules() if "mtp" in name and name.endswith(".router")]
told("multi-token prediction", lambda: whole_step(model))
said["its router is left alone"] = [
    len(RouterReplay.global_router_replay_instances) == tiny.MOE_LAYERS + 1,
    own in RouterReplay.global_router_replay_instances,
    own.target_topk_idx is None,
]
select = router_module.topk_routing_with_score_function
router_module.topk_routing_with_score_function = lambda *a, **k: select(*a, **{**k, "router_replay": None})
told("selection drops it", lambda: whole_step(tiny.build()))
print(json.dumps(said))
