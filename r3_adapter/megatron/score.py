"""One rank of the trainer, as a process: log-probabilities of samples, routed live and with their routes replayed.

python -m r3_adapter.megatron.score REQUEST.json RANK
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from r3_adapter.errors import LayoutError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.model import build_model, initialize
from r3_adapter.megatron.monitor import RouterMonitor
from r3_adapter.megatron.replay import prepare
from r3_adapter.megatron.request import MODES, ScoreRequest
from r3_adapter.rollout import Sample, load_samples, response_positions, stack_tokens


def main(argv: Sequence[str]) -> None:
    """Score on this rank, and write what it knows to the request's out folder."""
    path, rank = argv
    request = ScoreRequest(**json.loads(Path(path).read_text(encoding="utf-8")))
    layout = ParallelLayout(**request.layout)
    device = initialize(layout, int(rank), Path(request.rendezvous))
    chunks = build_model(Path(request.checkpoint), layout, dispatcher=request.dispatcher)
    samples = load_samples(Path(request.samples))
    coords = layout.coords(int(rank))
    own = micro_batches(len(samples), layout, request.micro_batch_size, coords.dp_rank)
    out = Path(request.out)
    for mode in MODES:
        monitor = RouterMonitor()
        with monitor.watch(chunks), (out / f"progress.{mode}.{rank}").open("ab", buffering=0) as bar:
            step = partial(bar.write, b"." * request.micro_batch_size if coords.tp_rank == 0 else b"")
            logprobs = _score(chunks, samples, own, layout, device, monitor, step, replay=mode == "replay")
        counts = {str(layer): asdict(counts) for layer, counts in monitor.layers.items()}
        (out / f"{mode}.{rank}.json").write_text(json.dumps(counts), encoding="utf-8")
        if logprobs and coords.tp_rank == 0:
            save_file({str(index): value for index, value in logprobs.items()}, out / f"{mode}.{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def micro_batches(num_samples: int, layout: ParallelLayout, size: int, dp_rank: int) -> list[range]:
    """Return the samples of each micro-batch of a data-parallel rank; all ranks have the same number of them.

    Raises:
        LayoutError: samples that cannot be shared out evenly.
    """
    if num_samples % (size * layout.dp):
        raise LayoutError(f"{num_samples} samples are not a multiple of micro-batch ({size}) x dp ({layout.dp})")
    return [range(start, start + size) for start in range(dp_rank * size, num_samples, size * layout.dp)]


def _score(
    chunks: Sequence[torch.nn.Module],
    samples: Sequence[Sample],
    own: Sequence[range],
    layout: ParallelLayout,
    device: torch.device,
    monitor: RouterMonitor,
    progress: Callable[[], object],
    *,
    replay: bool,
) -> dict[int, np.ndarray[Any, Any]]:
    """Run the forward passes; the last pipeline stage returns [R] log-probabilities by sample, NaN where not here."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    seq_length = _round_up(max(sample.trace.num_tokens for sample in samples), layout.tp * layout.cp * 2)
    found: dict[int, np.ndarray[Any, Any]] = {}

    def forward_step(batches: Iterator[range], model: torch.nn.Module) -> Any:
        chosen = next(batches)
        part = _micro_batch([samples[i] for i in chosen], seq_length, device)
        batch = prepare(model, [samples[i].trace for i in chosen], part["tokens"])
        monitor.expect(batch)
        routes = {"routed_experts": batch.routed_experts} if replay else {}
        output = model(part["tokens"], part["positions"], None, labels=part["labels"], **routes)

        def keep(losses: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            for i, row, at in zip(chosen, losses.float().cpu().numpy(), part["positions"].cpu().numpy(), strict=True):
                whole = np.full(seq_length, np.nan, np.float32)
                whole[at] = -row
                found[i] = whole[response_positions(samples[i])]
            progress()
            return losses

        return output, keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(own) for _ in chunks] if len(chunks) > 1 else iter(own),
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(own),
            seq_length=seq_length,
            micro_batch_size=len(own[0]),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found


def _micro_batch(samples: Sequence[Sample], seq_length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return [b, s / cp] tokens, labels (each position's next token) and positions of this rank."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    tokens = torch.from_numpy(stack_tokens(samples, seq_length)).to(device)
    positions = torch.arange(seq_length, device=device).expand_as(tokens).contiguous()
    batch = {"tokens": tokens, "labels": tokens.roll(-1, dims=1), "positions": positions}
    part: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(batch)
    return part


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


if __name__ == "__main__":
    main(sys.argv[1:])
