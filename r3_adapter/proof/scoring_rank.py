"""One rank of the trainer, as a process: log-probabilities of samples, routed live and with their routes replayed.

python -m r3_adapter.proof.scoring_rank REQUEST.json ... RANK

Requests of one layout; each is of a checkpoint and its samples.

R: response tokens of a sample.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.attach import Attached, attach
from r3_adapter.megatron.batches import MicroBatch, micro_batches
from r3_adapter.megatron.monitor import RouterMonitor
from r3_adapter.megatron.policy_trainer.build import build_model, build_optimizer, initialize
from r3_adapter.megatron.policy_trainer.options import BESIDE_MICRO_BATCH, ScoreRequest, TrainerOptions
from r3_adapter.megatron.policy_trainer.step import Routes, forward, training_step
from r3_adapter.megatron.replay import prepare_step
from r3_adapter.megatron.replay_batch import StepInput
from r3_adapter.proof.collectives import counted
from r3_adapter.rollout import Sample, load_samples

Found = dict[int, np.ndarray[Any, Any]]


def main(argv: Sequence[str]) -> None:
    """Score on this rank, one request after the other, and write what it knows to each one's out folder."""
    *paths, rank = argv
    requests = [ScoreRequest(**json.loads(Path(path).read_text(encoding="utf-8"))) for path in paths]
    layout = ParallelLayout(**requests[0].layout)
    device = initialize(layout, int(rank), f"file://{requests[0].rendezvous}")
    for request in requests:
        _score(request, layout, int(rank), device)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _score(request: ScoreRequest, layout: ParallelLayout, rank: int, device: torch.device) -> None:
    options = TrainerOptions(**request.options)
    chunks = build_model(Path(request.checkpoint), layout, options)
    optimizer = None
    if "train" in request.passes:
        chunks, optimizer = build_optimizer(chunks, distributed=options.distributed_optimizer)
    attached = None if options.attach is None else attach(chunks, options.attach)
    load = partial(_load, layout=layout, rank=rank, options=options, device=device)
    own = load(request.samples, options.micro_batch_size)
    jobs = [(name, own, options.micro_batch_size) for name in request.passes]
    if request.beside:
        # A training step changes the weights.
        at = request.passes.index("train") if "train" in request.passes else len(jobs)
        jobs.insert(at, ("beside", load(request.beside, BESIDE_MICRO_BATCH), BESIDE_MICRO_BATCH))
    first_of_tp, out = layout.coords(rank).tp_rank == 0, Path(request.out)
    for name, (samples, batches), size in jobs:
        with (out / f"progress.{name}.{rank}").open("ab", buffering=0) as bar:
            step = partial(bar.write, b"." * size if first_of_tp else b"")
            figures, logprobs = _run(name, options, chunks, attached, optimizer, samples, batches, step)
        (out / f"{name}.{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
        if logprobs and first_of_tp:
            save_file({str(i): value for i, value in logprobs.items()}, out / f"{name}.{rank}.safetensors")


def _load(
    folder: str, size: int, *, layout: ParallelLayout, rank: int, options: TrainerOptions, device: torch.device
) -> tuple[Sequence[Sample], list[MicroBatch]]:
    """Read samples, and build this rank's micro-batches of `size` of them."""
    samples = load_samples(Path(folder))
    batches = micro_batches(
        samples, layout, rank, size=size, qkv_format=options.qkv_format, device=device, cp_cut=options.cp_cut
    )
    return samples, batches


def _run(
    name: str,
    options: TrainerOptions,
    chunks: list[torch.nn.Module],
    attached: Attached | None,
    optimizer: Any,
    samples: Sequence[Sample],
    batches: Sequence[MicroBatch],
    progress: Callable[[], object],
) -> tuple[dict[str, Any], Found]:
    """Make one pass; return its figures, and [R] log-probabilities by sample, NaN where another rank has them."""
    inputs = [StepInput(each.traces, each.tokens, each.packing) for each in batches]
    routes = prepare_step(chunks, inputs, plan=options.dispatch_plan, backend="auto")
    found: Found = {}
    monitor, keep = RouterMonitor(), partial(_keep, found, samples, progress)
    with monitor.watch(chunks), counted(chunks) as collectives:
        if name == "train":
            grad_norm = training_step(
                chunks, optimizer, batches, routes, attached=attached, expect=monitor.expect, keep=keep
            )
        else:
            forward(chunks, batches, routes, live=name == "live", attached=attached, expect=monitor.expect, keep=keep)
            grad_norm = None
    layers = {str(layer): asdict(counts) for layer, counts in monitor.layers.items()}
    tokens = {"tokens": 0, "tokens_equal": 0}
    for equal in monitor.tokens.values():
        tokens["tokens"] += len(equal)
        tokens["tokens_equal"] += int(equal.sum())
    figures = {"layers": layers, "tokens": tokens, "grad_norm": grad_norm, "collectives": asdict(collectives)}
    backend = "argument" if attached is None else attached.backend
    return {**figures, "why_not_planned": _why_not_planned(routes), "backend": backend}, found


def _why_not_planned(routes: Routes) -> str:
    """Return the first reason why a micro-batch has no plan; empty if all have one."""
    return next((each.plan.why_not for step in routes for each in step if each.plan.why_not), "")


def _keep(
    found: Found, samples: Sequence[Sample], progress: Callable[[], object], batch: MicroBatch, losses: torch.Tensor
) -> None:
    """Put the log-probabilities of a micro-batch, [b, s] or [1, t], where their samples and positions are."""
    values, chosen = -losses.detach().float().cpu().numpy(), batch.loss_mask.cpu().numpy() > 0
    for (i, position), value in zip(batch.places[chosen], values[chosen], strict=True):
        sample = samples[i]
        row = found.setdefault(int(i), np.full(sample.num_response_tokens, np.nan, np.float32))
        row[position - sample.num_prompt_tokens + 1] = value
    progress()


if __name__ == "__main__":
    main(sys.argv[1:])
