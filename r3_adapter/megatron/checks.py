"""What replay refuses: options that bypass it or lose what it replays, layouts that Megatron trains wrongly."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.layout import ParallelLayout
from r3_adapter.trace import RoutingTrace

NEEDED: Mapping[str, tuple[Any, str]] = {
    "moe_router_force_load_balancing": (False, "it replaces the logits by random ones"),
    "moe_router_force_biased": (None, "it replaces the logits by random ones"),
    "moe_expert_capacity_factor": (None, "it drops tokens from the experts that they were routed to"),
    "moe_enable_routing_replay": (False, "it selects experts itself"),
    "cuda_graph_impl": ("none", "graphs are captured without the argument"),
    "overlap_moe_expert_parallel_comm": (False, "its schedule plan has no argument for routes"),
    "mlp_chunks_for_training": (1, "a chunk of the sequence is given no routes"),
}
"""Fields of TransformerConfig with the value that replay needs, and why; a pin that lacks one has not the option."""

SELECTS = ("sinkhorn", "quantile_balancing")
"""Kinds of load balancing that select experts themselves."""

_TP_REPLICAS_MENDED = "0.19"
"""Megatron-core from here on reduces the gradients of experts that tensor-parallel ranks all have."""


def check_layout(layout: ParallelLayout) -> None:
    """Refuse layouts that the installed Megatron-core itself trains wrongly.

    Raises:
        LayoutError: Such a layout, with the reason.
    """
    if layout.tp > 1 and layout.ep == 1 and layout.etp == 1:
        try:
            installed = version("megatron-core")
        except PackageNotFoundError:
            installed = "0"
        if Version(installed) < Version(_TP_REPLICAS_MENDED):
            raise LayoutError(
                f"tp ({layout.tp}) > 1 with ep 1 and etp 1: megatron-core before {_TP_REPLICAS_MENDED} (installed: "
                f"{installed}) does not reduce the gradients of such experts over tensor-parallel ranks, and their "
                "copies drift apart; use etp = tp, or ep > 1"
            )


def check_router(layer_id: int, router: Any, traces: Sequence[RoutingTrace]) -> None:
    """Refuse a router that would not follow the traces, or whose model is not theirs.

    Raises:
        ReplayError: Names the layer and both operands.
    """
    config = router.config
    for name, (want, why) in NEEDED.items():
        found = getattr(config, name, want)
        if found != want:
            raise ReplayError(f"layer {layer_id}: {name} ({found!r}) != {want!r}: {why}")
    chunks = config.virtual_pipeline_model_parallel_size
    if chunks and config.pipeline_model_parallel_size == 2 and config.batch_p2p_comm:
        # Both neighbours of a stage are one rank then, and its two sends in a batch are not told apart.
        raise ReplayError(
            f"layer {layer_id}: batch_p2p_comm (True) != False with pp 2 and vpp {chunks}: megatron-core mixes "
            "up the chunks' activations; use overlap_p2p_comm"
        )
    if any(kind in router.routing_type for kind in SELECTS):
        raise ReplayError(f"layer {layer_id}: load balancing {router.routing_type!r} selects experts itself")
    for index, trace in enumerate(traces):
        shape, routes = (config.num_moe_experts, router.topk), (trace.num_experts, trace.topk)
        if routes != shape:
            raise ReplayError(f"sample {index}: (experts, top-k) {routes} of its trace != {shape} of layer {layer_id}")
