"""One rank of the trainer, as a process: log-probabilities of samples, routed live and with their routes replayed.

python -m r3_adapter.megatron.score REQUEST.json RANK

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
from r3_adapter.megatron.collectives import counted
from r3_adapter.megatron.model import build_model, build_optimizer, initialize
from r3_adapter.megatron.monitor import RouterMonitor
from r3_adapter.megatron.replay import StepInput, prepare_step
from r3_adapter.megatron.request import ScoreRequest, TrainerOptions
from r3_adapter.megatron.step import Routes, forward, training_step
from r3_adapter.rollout import Sample, load_samples

Found = dict[int, np.ndarray[Any, Any]]


def main(argv: Sequence[str]) -> None:
    """Score on this rank, and write what it knows to the request's out folder."""
    path, rank = Path(argv[0]), int(argv[1])
    request = ScoreRequest(**json.loads(path.read_text(encoding="utf-8")))
    layout, options = ParallelLayout(**request.layout), TrainerOptions(**request.options)
    device = initialize(layout, rank, f"file://{request.rendezvous}")
    chunks = build_model(Path(request.checkpoint), layout, options)
    optimizer = None
    if "train" in request.passes:
        chunks, optimizer = build_optimizer(chunks, distributed=options.distributed_optimizer)
    attached = None if options.attach is None else attach(chunks, options.attach)
    samples = load_samples(Path(request.samples))
    batches = micro_batches(
        samples,
        layout,
        rank,
        size=options.micro_batch_size,
        qkv_format=options.qkv_format,
        device=device,
        cp_cut=options.cp_cut,
    )
    first_of_tp, out = layout.coords(rank).tp_rank == 0, Path(request.out)
    for name in request.passes:
        with (out / f"progress.{name}.{rank}").open("ab", buffering=0) as bar:
            step = partial(bar.write, b"." * options.micro_batch_size if first_of_tp else b"")
            figures, logprobs = _run(name, options, chunks, attached, optimizer, samples, batches, step)
        (out / f"{name}.{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
        if logprobs and first_of_tp:
            save_file({str(i): value for i, value in logprobs.items()}, out / f"{name}.{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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
    tokens = {"rows": 0, "rows_equal": 0}
    for equal in monitor.tokens.values():
        tokens["rows"] += len(equal)
        tokens["rows_equal"] += int(equal.sum())
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
