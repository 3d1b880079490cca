"""The replay argument for a Megatron model: the routes of a micro-batch, cut for one rank and one model chunk.

T: tokens of this rank; M: MoE layers of the chunk; K: experts a token; E: experts of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import RankRoutes, repack
from r3_adapter.trace import RoutingTrace


@dataclass(frozen=True)
class ReplayBatch:
    """What one rank's model chunk replays in one micro-batch.

    routed_experts: [M, T, K] int16, on the chunk's device; -1 in a row that is routed live. Give it to
        GPTModel.forward as the argument of that name.
    routes: the same on the host, with the kind and the weight version of each row.
    """

    routed_experts: torch.Tensor
    routes: RankRoutes


def current_layout() -> ParallelLayout:
    """Return the layout that Megatron's parallel_state was initialised with."""
    from megatron.core import parallel_state as ps

    return ParallelLayout(
        tp=ps.get_tensor_model_parallel_world_size(),
        pp=ps.get_pipeline_model_parallel_world_size(),
        vpp=ps.get_virtual_pipeline_model_parallel_world_size() or 1,
        cp=ps.get_context_parallel_world_size(),
        ep=ps.get_expert_model_parallel_world_size(),
        etp=ps.get_expert_tensor_parallel_world_size(),
        dp=ps.get_data_parallel_world_size(),
    )


def moe_routers(chunk: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """Yield the global decoder layer (from 0) and the router of each MoE layer of a GPTModel, wrapped or not.

    Layers of multi-token prediction are not among them: routers there see no route.
    """
    model: Any = chunk
    while hasattr(model, "module"):
        model = model.module
    for layer in model.decoder.layers:
        if layer.is_moe_layer:
            yield layer.layer_number - 1, layer.mlp.router


def prepare(
    chunk: torch.nn.Module,
    traces: Sequence[RoutingTrace],
    tokens: torch.Tensor,
    *,
    packing: Packing | None = None,
    layout: ParallelLayout | None = None,
) -> ReplayBatch:
    """Check the traces of a micro-batch against its tokens, and cut them for this rank's model chunk.

    Call it before the step: it raises before any collective is entered.

    chunk: the model chunk whose forward gets the routes.
    traces: one for each sample of the micro-batch, in order.
    tokens: [b, s] int64; the input_ids that this rank's model is given, [b, s / cp] under context parallelism; padding
        behind each sample.
    packing: how the samples lie in the micro-batch; the default is a padded batch of the tokens' shape.
    layout: default: Megatron's own.

    Raises:
        R3Error: traces that are not this model's or these tokens', or a layout that cannot hold them; names sample and
            position, and both operands.
    """
    layout = layout or current_layout()
    check_layout(layout)
    routers = dict(moe_routers(chunk))
    for layer_id, router in routers.items():
        _check_router(layer_id, router, traces)
    if packing is None:
        packing = Packing.padded(num_samples=len(traces), seq_length=tokens.shape[1] * layout.cp)
    routes = repack(
        traces,
        packing,
        layout,
        torch.distributed.get_rank(),
        layer_ids=np.fromiter(routers, np.int32),
        input_ids=tokens.cpu().numpy(),
        dtype=np.dtype(np.int16),
    )
    return ReplayBatch(torch.from_numpy(routes.topk_ids).to(tokens.device), routes)


_REFUSED: Mapping[str, tuple[Any, str]] = {
    "moe_router_force_load_balancing": (False, "it replaces the logits by random ones"),
    "moe_expert_capacity_factor": (None, "it drops tokens from the experts that they were routed to"),
    "moe_enable_routing_replay": (False, "it selects experts itself"),
    "cuda_graph_impl": ("none", "graphs are captured without the argument"),
    "overlap_moe_expert_parallel_comm": (False, "its schedule plan has no argument for routes"),
}
"""Fields of TransformerConfig with the value that replay needs, and why."""


def _check_router(layer_id: int, router: Any, traces: Sequence[RoutingTrace]) -> None:
    """Refuse what would bypass replay or lose what it replays, and traces of a model with other routers."""
    for name, (want, why) in _REFUSED.items():
        found = getattr(router.config, name)
        if found != want:
            raise ReplayError(f"layer {layer_id}: {name} ({found!r}) != {want!r}: {why}")
    if "sinkhorn" in router.routing_type:
        raise ReplayError(f"layer {layer_id}: load balancing {router.routing_type!r} selects experts itself")
    for index, trace in enumerate(traces):
        shape, routes = (router.config.num_moe_experts, router.topk), (trace.num_experts, trace.topk)
        if routes != shape:
            raise ReplayError(f"sample {index}: (experts, top-k) {routes} of its trace != {shape} of layer {layer_id}")


def check_layout(layout: ParallelLayout) -> None:
    """Refuse layouts that megatron-core 0.16.1 itself trains wrongly.

    Raises:
        LayoutError: Such a layout, with the reason.
    """
    if layout.tp > 1 and layout.ep == 1 and layout.etp == 1:
        raise LayoutError(
            f"tp ({layout.tp}) > 1 with ep 1 and etp 1: megatron-core 0.16.1 does not reduce the gradients of such "
            "experts over tensor-parallel ranks, and their copies drift apart; use etp = tp, or ep > 1"
        )
