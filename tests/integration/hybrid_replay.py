"""Replay in a hybrid model of real Megatron on this process alone; print what each case says, as JSON.

python hybrid_replay.py BACKEND
"""

import json
import sys
from typing import Any

import hybrid_tiny as hybrid
import megatron_tiny as tiny
import numpy as np
import torch

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.attach import attach
from r3_adapter.megatron.backends import Backend
from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.replay import StepInput, prepare, prepare_step
from r3_adapter.trace import ModelId, RoutingTrace

BACKEND: Backend = sys.argv[1]  # type: ignore[assignment]
said, told = tiny.said, tiny.told
tiny.start()
torch.manual_seed(11)
TOKENS = torch.randint(0, tiny.VOCAB, (tiny.BATCH, tiny.SEQ))  # Those of megatron_tiny.forward.


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all gradients by parameter."""
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def maps_of(model: torch.nn.Module) -> dict[int, list[torch.Tensor]]:
    """Return what the routers will have used, by layer and call."""
    maps: dict[int, list[torch.Tensor]] = {}
    for layer, router in moe_routers(model):
        router.register_forward_hook(lambda *call, layer=layer: maps.setdefault(layer, []).append(call[2][1]))
    return maps


def replay(model: torch.nn.Module, traces: list[RoutingTrace]) -> torch.Tensor:
    """Run one step with routes, by hooks."""
    attached = attach([model], BACKEND)
    said["backend"] = attached.backend
    steps = prepare_step([model], [StepInput(traces, TOKENS)], layout=ParallelLayout(), backend=attached.backend)
    said["plan"] = steps[0][0].plan.kind
    with attached.replaying(steps):
        losses = tiny.forward(model)
        losses.mean().backward()
    attached.detach()
    return losses.detach()


def as_traced(name: str, pattern: str, layers: list[int], **options: Any) -> None:
    """Say whether each router, in each pass, has used the experts of its own tokens and layer."""
    model = hybrid.build(pattern, **options)
    maps = maps_of(model)
    replay(model, hybrid.make_traces(TOKENS, layers))
    want = [
        [sorted(hybrid.ids_at(row % tiny.BATCH, row // tiny.BATCH, moe)) for row in range(tiny.TOKENS)]
        for moe in range(len(layers))
    ]
    used = [
        all(each.nonzero()[:, 1].view(-1, tiny.TOPK).tolist() == rows for each in maps[layer])
        for layer, rows in zip(sorted(maps), want, strict=True)
    ]
    said[name] = [sorted(maps), [len(maps[layer]) for layer in sorted(maps)], used]


def own_routes_change_no_bit(name: str, pattern: str, **options: Any) -> None:
    """Compare a step that replays its own routes, recomputing or not, with the live step without recomputation."""
    plain = {key: value for key, value in options.items() if not key.startswith("recompute")}
    model = hybrid.build(pattern, **plain)
    maps = maps_of(model)
    losses = tiny.forward(model)
    losses.mean().backward()
    layers = hybrid.moe_letters(pattern)
    ids = torch.stack([maps[layer][0].nonzero()[:, 1].view(-1, tiny.BATCH, tiny.TOPK) for layer in layers])
    traces = []
    for sample, tokens in enumerate(TOKENS.numpy().astype(np.int32)):
        rows = ids[:, :, sample].transpose(0, 1).numpy().astype(np.uint8)
        versions = np.zeros(len(tokens), np.int32)
        traces.append(RoutingTrace(rows, tokens, versions, np.array(layers, np.int32), tiny.EXPERTS, ("v",)))
    replayed = hybrid.build(pattern, **options)
    found = replay(replayed, traces)
    live, own = gradients(model), gradients(replayed)
    said[name] = torch.equal(found, losses) and {*live} == {*own} and all(torch.equal(live[k], own[k]) for k in live)


PAIRED = [layer // 2 for layer in hybrid.moe_letters(hybrid.PAIRS)]
BLOCKS = hybrid.moe_letters(hybrid.BLOCKS)
modes = tiny.RECOMPUTE if hybrid.NAMED else {key: tiny.RECOMPUTE[key] for key in ("none", "moe")}
for recompute, options in modes.items():
    as_traced(f"blocks, recompute {recompute}", hybrid.BLOCKS, BLOCKS, **options)
    own_routes_change_no_bit(f"own routes, recompute {recompute}", hybrid.BLOCKS, **options)
as_traced("pairs", hybrid.PAIRS, PAIRED)
as_traced("pairs by the model's numbers", hybrid.PAIRS, hybrid.moe_letters(hybrid.PAIRS))
for recompute, options in tiny.RECOMPUTE.items():
    as_traced(f"gated, recompute {recompute}", hybrid.GATED, [0, 1, 2, 3], **options)
    own_routes_change_no_bit(f"own routes, gated, recompute {recompute}", hybrid.GATED, **options)
if hybrid.NAMED:
    as_traced("gated, hybrid", hybrid.GATED_LETTERS, [0, 1, 2])
    as_traced("latent experts", hybrid.BLOCKS, BLOCKS, moe_latent_size=hybrid.LATENT)
    own_routes_change_no_bit("own routes, latent experts", hybrid.BLOCKS, moe_latent_size=hybrid.LATENT)


def prepared(pattern: str, layers: list[int], identity: ModelId | None = None) -> None:
    """Prepare a micro-batch, and do nothing with it."""
    model = hybrid.build(pattern)
    attached = attach([model], BACKEND)
    prepare(model, hybrid.make_traces(TOKENS, layers, model=identity), TOKENS, backend=attached.backend)


def named(num_layers: int) -> ModelId:
    """Return what a trace says of its model."""
    return ModelId(num_layers, tiny.HIDDEN, tiny.VOCAB)


told("a layer too few", lambda: prepared(hybrid.BLOCKS, BLOCKS[:-1]))
told("a layer moved", lambda: prepared(hybrid.BLOCKS, [1, 3, 6]))
told("pairs for blocks", lambda: prepared(hybrid.BLOCKS, [layer // 2 for layer in BLOCKS]))
told("one pair moved", lambda: prepared(hybrid.PAIRS, [0, 2, 3]))
told("pairs of their model", lambda: prepared(hybrid.PAIRS, PAIRED, named(4)))
told("pairs of a deeper model", lambda: prepared(hybrid.PAIRS, PAIRED, named(8)))
told("blocks of their model", lambda: prepared(hybrid.BLOCKS, BLOCKS, named(8)))
told("blocks of a deeper model", lambda: prepared(hybrid.BLOCKS, BLOCKS, named(16)))
print(json.dumps(said))
