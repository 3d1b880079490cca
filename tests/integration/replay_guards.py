"""One rank of a two-rank trainer (EP 2): each damage of one rank's data must raise on both, before any collective.

python replay_guards.py CHECKPOINT SAMPLES RENDEZVOUS RANK; prints one JSON object: what each case raised here.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r3_adapter.environment import environment
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.megatron.batches import micro_batches
from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.policy_trainer.build import build_model, initialize
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.replay import StepInput, prepare_step
from r3_adapter.rollout import load_samples
from r3_adapter.trace import RoutingTrace

VERSION = "default"


def _other_token(trace: RoutingTrace) -> RoutingTrace:
    tokens = trace.token_ids.copy()
    tokens[5] += 1
    return replace(trace, token_ids=tokens)


def _shifted(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, token_ids=np.roll(trace.token_ids, 1))


def _too_long(trace: RoutingTrace) -> RoutingTrace:
    more = {name: np.concatenate([getattr(trace, name)] * 3) for name in ("topk_ids", "token_ids", "version_ids")}
    return replace(trace, **more)


def _other_layers(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, topk_ids=trace.topk_ids[:, 1:].copy(), layer_ids=trace.layer_ids[1:].copy())


def _fewer_layers(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, topk_ids=trace.topk_ids[:, :-1].copy(), layer_ids=trace.layer_ids[:-1].copy())


def _fewer_experts(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, topk_ids=trace.topk_ids[..., :-1].copy())


def _other_model(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, num_experts=64)


def _stale(trace: RoutingTrace) -> RoutingTrace:
    versions = trace.version_ids.copy()
    versions[7] = 1
    return replace(trace, version_ids=versions, weight_versions=(*trace.weight_versions, "older"))


DAMAGES: dict[str, Callable[[RoutingTrace], RoutingTrace]] = {
    "another token": _other_token,
    "shifted by one": _shifted,
    "too long": _too_long,
    "another layer map": _other_layers,
    "fewer layers": _fewer_layers,
    "fewer experts a token": _fewer_experts,
    "another model": _other_model,
    "stale weights": _stale,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "moe_router_force_load_balancing": {"moe_router_force_load_balancing": True},
    "moe_expert_capacity_factor": {"moe_expert_capacity_factor": 1.0},
    "moe_enable_routing_replay": {"moe_enable_routing_replay": True},
    "cuda_graph_impl": {"cuda_graph_impl": "local"},
    "batch_p2p_comm": {
        "batch_p2p_comm": True,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
}


def main(argv: Sequence[str]) -> None:
    """Run all cases; the damage is rank 1's alone."""
    checkpoint, folder, rendezvous, rank = Path(argv[0]), Path(argv[1]), Path(argv[2]), int(argv[3])
    layout = ParallelLayout.smallest(ep=2)
    device = initialize(layout, rank, f"file://{rendezvous}")
    options = TrainerOptions()
    chunks = build_model(checkpoint, layout, options)
    samples = load_samples(folder)
    batches = micro_batches(samples, layout, rank, size=2, qkv_format="sbhd", device=device)
    steps = [StepInput(each.traces, each.tokens, each.packing) for each in batches]
    said: dict[str, Any] = {}

    def attempt(name: str, inputs: Sequence[StepInput], **policy: Any) -> None:
        try:
            routes = prepare_step(chunks, inputs, weight_version=VERSION, **policy)[0]
            said[name] = [[each.routes.num_replayed, each.routes.num_live, each.num_stale] for each in routes]
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    def damaged(change: Callable[[RoutingTrace], RoutingTrace]) -> list[StepInput]:
        if rank == 0:
            return steps
        return [steps[0], replace(steps[1], traces=[steps[1].traces[0], change(steps[1].traces[1])]), *steps[2:]]

    for name, change in DAMAGES.items():
        attempt(name, damaged(change))
    attempt("too few traces", [replace(steps[0], traces=steps[0].traces[rank:]), *steps[1:]])
    packing = Packing.padded(2, steps[0].tokens.shape[1] - 2 * rank)
    attempt("another packing", [replace(steps[0], packing=packing), *steps[1:]])
    attempt("stale, live", damaged(_stale), staleness="live")
    attempt("stale, keep", damaged(_stale), staleness="keep")
    config = dict(moe_routers(chunks[0]))[0].config  # type: ignore[union-attr]
    for option, values in OPTIONS.items():
        before = {name: getattr(config, name) for name in values}
        vars(config).update(values if rank == 1 else {})
        attempt(option, steps)
        vars(config).update(before)
    with environment({"ENABLE_ROUTING_REPLAY": str(rank)}):
        attempt("another replay", steps)
    attempt("nothing", steps)
    print(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
