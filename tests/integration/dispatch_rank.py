"""A rank that trains on one set of routes: dispatched live, by routes, and by a plan; then by plans that are wrong.

python dispatch_rank.py FOLDER LAYOUT OPTIONS RANK; writes RANK.json into the folder, which has the model.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r3_adapter.balance.budgets import budgets_of_routes
from r3_adapter.errors import ReplayError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.attach import attach
from r3_adapter.megatron.batches import MicroBatch, micro_batches
from r3_adapter.megatron.layers import unwrapped
from r3_adapter.megatron.policy_trainer.build import build_model, build_optimizer, initialize
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.step import training_step
from r3_adapter.megatron.replay import ReplayBatch, StepInput, prepare_step
from r3_adapter.proof.collectives import counted
from r3_adapter.proof.tiny import TinyModel
from r3_adapter.repack import repack
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace

Steps = list[list[ReplayBatch]]
NUM_SAMPLES = 8
OVERLAP = "overlap_moe_expert_parallel_comm"


def make_samples() -> list[Sample]:
    """Samples of several lengths, whose routes load experts unevenly, each layer in its own way."""
    rng, tiny = np.random.default_rng(5), TinyModel()
    samples = []
    popular = rng.normal(0, 1.5, (1, tiny.num_layers, tiny.num_experts))
    for _ in range(NUM_SAMPLES):
        length = int(rng.integers(20, 40))
        tokens = rng.integers(3, tiny.vocab_size, length).astype(np.int32)
        scores = popular + rng.gumbel(size=(length, tiny.num_layers, tiny.num_experts))
        ids = np.argsort(-scores, axis=-1)[..., : tiny.topk].astype(np.uint8)
        versions = np.zeros(length, np.int32)
        versions[-1], ids[-1] = -1, 0
        layers = np.arange(tiny.num_layers, dtype=np.int32)
        trace = RoutingTrace(ids, tokens, versions, layers, tiny.num_experts, ("w0",))
        samples.append(Sample(trace, 8, np.zeros(length - 8, np.float32)))
    return samples


class Rank:
    """The model and the batches of a rank; each step begins with the same weights."""

    def __init__(self, model: Path, layout: ParallelLayout, options: TrainerOptions, batches: list[MicroBatch]) -> None:
        self._model, self._layout, self._options, self.batches = model, layout, options, batches
        self.chunks: list[torch.nn.Module] = []

    def step(
        self, routes: Callable[[list[StepInput]], Steps | None], *, attached: bool = False, **arguments: Any
    ) -> dict[str, Any]:
        """Train once; routes: makes them of the inputs. Return a hash of losses, gradients and weights, and counts.

        attached: hand the routes over by hooks. arguments: of Megatron, that win over those of all steps.
        """
        torch.manual_seed(0)
        arguments = {**self._options.megatron_arguments, **arguments}
        chunks = build_model(self._model, self._layout, replace(self._options, megatron_arguments=arguments))
        self.chunks, optimizer = build_optimizer(chunks, distributed=self._options.distributed_optimizer)
        hooks = attach(self.chunks, "patch", outside="refuse") if attached else None
        given = routes([StepInput(each.traces, each.tokens, each.packing) for each in self.batches])
        digest = hashlib.sha256()
        received: list[int] = []
        for name, module in (each for chunk in chunks for each in chunk.named_modules()):
            if name.endswith(".experts"):
                module.register_forward_pre_hook(lambda _, arguments: received.append(len(arguments[0])))
        with counted(self.chunks) as found:
            training_step(
                self.chunks,
                optimizer,
                self.batches,
                given,
                attached=hooks,
                keep=lambda _, losses: digest.update(losses.detach().float().numpy().tobytes()),
            )
        for chunk in self.chunks:
            for _, parameter in sorted(unwrapped(chunk).named_parameters()):
                for tensor in (parameter.main_grad, parameter.detach()):
                    digest.update(tensor.float().numpy().tobytes())
        return {
            "digest": digest.hexdigest(),
            "per_layer": found.in_layers / max(1, found.layers),
            "exchanges": found.count_exchanges,
            "received": received,
            "why_not": [[each.plan.why_not for each in step] for step in given or []],
        }

    def prepared(self, inputs: list[StepInput], *, plan: bool = True) -> Steps:
        """Return the routes of a step."""
        return prepare_step(self.chunks, inputs, plan=plan)


def wrong_plans(rank: Rank, number: int) -> dict[str, Callable[[list[StepInput]], Steps]]:
    """Return steps that must not pass, or only without a plan, by name. number: this rank's."""

    def swapped(inputs: list[StepInput]) -> Steps:
        steps = rank.prepared(inputs)
        plans = [[batch.plan for batch in step][::-1] for step in steps]
        return [
            [replace(batch, plan=plan) for batch, plan in zip(*each, strict=True)]
            for each in zip(steps, plans, strict=True)
        ]

    def other_routes(inputs: list[StepInput]) -> Steps:
        steps = rank.prepared(inputs)
        if number == 1:
            # All tokens of the last layer go to the next expert but one.
            ids = steps[-1][0].routed_experts[-1]
            ids.copy_(((ids.to(torch.int32) + 2) % TinyModel().num_experts).to(ids.dtype))
        return steps

    def live_row(inputs: list[StepInput]) -> Steps:
        if number == 1:
            first = inputs[0].traces[0]
            versions, ids = first.version_ids.copy(), first.topk_ids.copy()
            versions[3], ids[3] = -1, 0
            traces = [replace(first, version_ids=versions, topk_ids=ids), *inputs[0].traces[1:]]
            inputs = [replace(inputs[0], traces=traces), *inputs[1:]]
        return rank.prepared(inputs)

    return {
        "plans changed places": swapped,
        "routes changed on rank 1": other_routes,
        "a live row on rank 1": live_row,
        "rank 1 plans none": lambda inputs: rank.prepared(inputs, plan=number != 1),
        "a micro-batch less on rank 1": lambda inputs: rank.prepared(inputs[number == 1 :]),
    }


def budgets(layout: ParallelLayout, options: TrainerOptions, number: int, device: torch.device) -> list[list[int]]:
    """Return what this rank will receive in each layer of each micro-batch, from the routes of all ranks."""
    size, qkv_format = options.micro_batch_size, options.qkv_format
    ranks = range(layout.world_size)
    steps = [
        micro_batches(make_samples(), layout, rank, size=size, qkv_format=qkv_format, device=device) for rank in ranks
    ]
    routes = [
        [
            repack(each.traces, each.packing, layout, rank, layer_ids=range(TinyModel().num_layers))
            for rank, each in zip(ranks, batches, strict=True)
        ]
        for batches in zip(*steps, strict=True)
    ]
    found: list[list[int]] = budgets_of_routes(routes, layout.ep).received[..., number % layout.ep].tolist()
    return found


def main(argv: Sequence[str]) -> None:
    """Run all cases."""
    folder, number = Path(argv[0]), int(argv[3])
    layout, options = ParallelLayout.smallest(**json.loads(argv[1])), TrainerOptions(**json.loads(argv[2]))
    device = initialize(layout, number, f"file://{folder}/rendezvous")
    batches = micro_batches(
        make_samples(), layout, number, size=options.micro_batch_size, qkv_format=options.qkv_format, device=device
    )
    rank = Rank(folder / "model", layout, options, batches)
    cases: dict[str, Callable[[list[StepInput]], Steps | None]] = {
        "live": lambda inputs: None,
        "replay": lambda inputs: rank.prepared(inputs, plan=False),
        "plan": rank.prepared,
    }
    if layout.world_size == 2 and options == TrainerOptions():
        cases.update(wrong_plans(rank, number))
    found: dict[str, Any] = {"attached": rank.step(rank.prepared, attached=True)}
    found["budgets"] = budgets(layout, options, number, device)
    if options.megatron_arguments.get(OVERLAP):
        found["in turns"] = rank.step(rank.prepared, **{OVERLAP: False})
    for name, routes in cases.items():
        try:
            found[name] = rank.step(routes)
        except ReplayError as error:
            found[name] = str(error)
    (folder / f"{number}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
