"""One rank of `r3 bench replay`, as a process: training steps routed live and replayed, in turns.

python -m r3_adapter.bench.replay_rank REQUEST.json RANK
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from r3_adapter.arena import Arena
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.batches import micro_batches
from r3_adapter.megatron.policy_trainer.build import build_model, build_optimizer, initialize
from r3_adapter.megatron.policy_trainer.options import ScoreRequest, TrainerOptions
from r3_adapter.megatron.policy_trainer.step import training_step
from r3_adapter.megatron.replay import prepare_step
from r3_adapter.megatron.replay_batch import StepInput
from r3_adapter.rollout import load_samples


def main(argv: Sequence[str]) -> None:
    """Time the steps; rank 0 writes {"live": [seconds], "replay": [seconds], "prepare": [seconds]}."""
    path, rank = Path(argv[0]), int(argv[1])
    request = ScoreRequest(**json.loads(path.read_text(encoding="utf-8")))
    layout, options = ParallelLayout(**request.layout), TrainerOptions(**request.options)
    device = initialize(layout, rank, f"file://{request.rendezvous}")
    chunks, optimizer = build_optimizer(
        build_model(Path(request.checkpoint), layout, options), distributed=options.distributed_optimizer
    )
    batches = micro_batches(
        load_samples(Path(request.samples)),
        layout,
        rank,
        size=options.micro_batch_size,
        qkv_format=options.qkv_format,
        cp_cut=options.cp_cut,
        device=device,
    )
    inputs = [StepInput(each.traces, each.tokens, each.packing) for each in batches]
    arena = Arena()
    seconds: dict[str, list[float]] = {"live": [], "replay": [], "prepare": []}
    for name in request.passes:
        torch.distributed.barrier()
        start = time.perf_counter()
        routes = None
        if name == "replay":
            routes = prepare_step(chunks, inputs, arena=arena, plan=options.dispatch_plan)
            seconds["prepare"].append(time.perf_counter() - start)
        training_step(chunks, optimizer, batches, routes)
        torch.distributed.barrier()
        seconds[name].append(time.perf_counter() - start)
        if rank == 0:
            with (Path(request.out) / "progress").open("ab") as bar:
                bar.write(b".")
    if rank == 0:
        (Path(request.out) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
