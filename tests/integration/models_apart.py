"""Two models in one process, whose passes interleave: each must compute what it computes alone, to the bit.

python models_apart.py CHECKPOINT OTHER_CHECKPOINT SAMPLES RENDEZVOUS; exits 0, or fails with what differs.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.batches import MicroBatch, micro_batches
from r3_adapter.megatron.policy_trainer.build import build_model, build_optimizer, initialize
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.step import Routes, forward, training_step
from r3_adapter.megatron.replay import StepInput, prepare_step
from r3_adapter.rollout import load_samples

Losses = list[torch.Tensor]


def main(argv: Sequence[str]) -> None:
    """Compute each result alone, then all of them interleaved, and compare."""
    checkpoint, other, samples, rendezvous = map(Path, argv)
    layout, options = ParallelLayout(), TrainerOptions(recompute="full")
    device = initialize(layout, 0, f"file://{rendezvous}")
    batches = micro_batches(load_samples(samples), layout, 0, size=2, qkv_format="sbhd", device=device)
    inputs = [StepInput(each.traces, each.tokens, each.packing) for each in batches]

    def policy() -> tuple[list[torch.nn.Module], object]:
        return build_optimizer(build_model(checkpoint, layout, options), distributed=False)

    def evaluate(chunks: list[torch.nn.Module], routes: Routes, *, live: bool) -> Losses:
        return _collect(lambda keep: forward(chunks, batches, routes, live=live, keep=keep))

    def train(chunks: list[torch.nn.Module], optimizer: object, routes: Routes) -> Losses:
        return _collect(lambda keep: training_step(chunks, optimizer, batches, routes, keep=keep))

    chunks, optimizer = policy()
    routes = prepare_step(chunks, inputs)
    alone = {"replay": evaluate(chunks, routes, live=False), "live": evaluate(chunks, routes, live=True)}
    alone["step 1"], alone["step 2"] = train(chunks, optimizer, routes), train(chunks, optimizer, routes)
    reference = build_model(other, layout, options)
    other_routes = prepare_step(reference, inputs)
    alone["reference"] = evaluate(reference, other_routes, live=True)
    alone["reference replay"] = evaluate(reference, other_routes, live=False)

    chunks, optimizer = policy()
    critic = build_model(other, layout, options)
    mixed_routes = prepare_step(chunks, inputs)
    mixed = {"replay": evaluate(chunks, mixed_routes, live=False)}
    del critic
    mixed["reference"] = evaluate(reference, other_routes, live=True)
    mixed["live"] = evaluate(chunks, mixed_routes, live=True)
    mixed["step 1"] = train(chunks, optimizer, mixed_routes)
    mixed["reference replay"] = evaluate(reference, other_routes, live=False)
    evaluate(chunks, mixed_routes, live=True)
    mixed["step 2"] = train(chunks, optimizer, mixed_routes)
    differ = [name for name in alone if not all(map(torch.equal, alone[name], mixed[name]))]
    same = [name for name in ("live", "reference") if all(map(torch.equal, alone[name], alone["replay"]))]
    if differ or same:
        sys.exit(f"differ between alone and interleaved: {differ}; should differ from replay and do not: {same}")
    torch.distributed.destroy_process_group()


def _collect(run: Callable[[Callable[[MicroBatch, torch.Tensor], None]], object]) -> Losses:
    losses: Losses = []
    run(lambda batch, found: losses.append(found.detach().clone()))
    return losses


if __name__ == "__main__":
    main(sys.argv[1:])
