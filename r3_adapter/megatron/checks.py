"""What replay refuses: options that bypass it or lose what it replays, layouts that Megatron trains wrongly."""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.backends import Channel
from r3_adapter.megatron.config_fields import RELEASES, SELECTS, refused_options, unknown_options
from r3_adapter.megatron.layers import trace_layers
from r3_adapter.trace import ModelId, RoutingTrace

_TP_REPLICAS_MENDED = "0.19"
"""Megatron-core from here on reduces the gradients of experts that tensor-parallel ranks all have."""

_OWN_REPLAY = "moe_enable_routing_replay"
"""Gives each router a RouterReplay, in the place of which `native` puts its own."""
_OTHER_REPLAY = "ENABLE_ROUTING_REPLAY"
"""The variable by which slime and miles turn their own replay on; it replaces the experts that a router was given.

Source: docker/patch/latest/megatron.patch@slime 624b824:topk_routing_with_score_function.
"""


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


def check_config(config: Any, layer_id: int, channel: Channel = "patch") -> None:
    """Refuse options that bypass replay or lose what it replays. channel: how experts get to the routers.

    Raises:
        ReplayError: Names the layer, the option, its value and the one that replay needs.
    """
    for name, found, wanted, why in refused_options(vars(config)):
        if channel == "native" and name == _OWN_REPLAY:
            continue
        raise ReplayError(f"layer {layer_id}: {name} ({found!r}) != {wanted}: {why}")
    for name, found in unknown_options(config):
        raise ReplayError(
            f"layer {layer_id}: {name} ({found!r}) is an option of none of the pinned releases "
            f"({', '.join(RELEASES)}): what it does to tokens and routers is not known; leave it at its default"
        )


def check_model(
    model: Any, routers: Mapping[int, Any], traces: Sequence[RoutingTrace], channel: Channel = "patch"
) -> Mapping[int, int]:
    """Refuse routers that would not follow the traces, and traces of another model.

    model: a GPTModel or a hybrid model; routers: its MoE routers by global layer; channel: how experts get to them.

    Returns:
        What the traces call each MoE layer of the model.

    Raises:
        ReplayError: Names the layer or the sample, and both operands.
    """
    if (found := os.environ.get(_OTHER_REPLAY, "0")) != "0":
        raise ReplayError(f"{_OTHER_REPLAY} ({found!r}) != '0': the training framework's own replay is on")
    seen = set()
    for layer_id, router in routers.items():
        if id(router.config) not in seen:
            check_config(router.config, layer_id, channel)
            seen.add(id(router.config))
        if any(kind in router.routing_type for kind in SELECTS):
            raise ReplayError(f"layer {layer_id}: load balancing {router.routing_type!r} selects experts itself")
    config = getattr(model, "config", None) or next(iter(routers.values())).config
    # The first layer of each shape; a stage without MoE layers has the model's.
    shapes = {(each.config.num_moe_experts, each.topk): f"layer {layer}" for layer, each in [*routers.items()][::-1]}
    shapes = shapes or {(config.num_moe_experts, config.moe_router_topk): "the model"}
    known, num_layers = trace_layers(model, config, traces)
    known = {layer: layer for layer in routers} | dict(known)
    checked = set()
    for index, trace in enumerate(traces):
        routes = (trace.num_experts, trace.topk)
        if (routes, trace.model) in checked:
            continue
        for shape, where in shapes.items():
            if routes != shape:
                raise ReplayError(f"sample {index}: (experts, top-k) {routes} of its trace != {shape} of {where}")
        _check_identity(index, trace.model, num_layers, config.hidden_size, getattr(model, "vocab_size", None))
        checked.add((routes, trace.model))
    # repack refuses traces of other layers than the first one's.
    layer_ids = traces[0].layer_ids.tolist()
    if extra := sorted({*layer_ids} - {*known.values()}):
        raise ReplayError(
            f"sample 0: layer {extra[0]} of its trace's {len(layer_ids)} MoE layers is none of the "
            f"model's {len(known)} ({len(extra)} such layers)"
        )
    return known


def _check_identity(
    index: int, identity: ModelId | None, num_layers: int, hidden_size: int, vocab_size: int | None
) -> None:
    """Compare what a trace says of its model; Megatron pads the vocabulary."""
    if identity is None:
        return
    for name, own in (("num_layers", num_layers), ("hidden_size", hidden_size)):
        if getattr(identity, name) != own:
            raise ReplayError(f"sample {index}: {name} ({getattr(identity, name)}) of its trace's model != {own}")
    if vocab_size is not None and identity.vocab_size > vocab_size:
        raise ReplayError(
            f"sample {index}: vocab_size ({identity.vocab_size}) of its trace's model > {vocab_size}, padding included"
        )
