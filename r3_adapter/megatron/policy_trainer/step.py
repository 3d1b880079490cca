"""Passes over the micro-batches of a step, by Megatron's own pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.attach import Attached
from r3_adapter.megatron.batches import MicroBatch
from r3_adapter.megatron.reach import routed_live
from r3_adapter.megatron.replay import check_dispatch
from r3_adapter.megatron.replay_batch import ReplayBatch
from r3_adapter.megatron.temperature import scored_at

Routes = Sequence[Sequence[ReplayBatch]]
"""By model chunk and micro-batch, as prepare_step returns them."""
Expect = Callable[[ReplayBatch], None]
Keep = Callable[[MicroBatch, torch.Tensor], None]
Objective = Callable[[MicroBatch, torch.Tensor], torch.Tensor]
"""Makes a loss for each token of the negative log-probability of its label; both have the shape of the tokens."""


def forward(
    chunks: list[torch.nn.Module],
    batches: Sequence[MicroBatch],
    routes: Routes,
    *,
    live: bool = False,
    attached: Attached | None = None,
    expect: Expect = lambda replay: None,
    keep: Keep = lambda batch, losses: None,
) -> None:
    """Run all micro-batches forward, as for old log-probabilities.

    live: leave the routes out, so that the routers select.
    attached: the chunks with hooks, which then hand over the routes; None to hand them over as an argument.
    expect: is told the routes of a micro-batch before a chunk is called with it.
    keep: gets each micro-batch's losses, [b, s / cp] or [1, t / cp], on the last pipeline stage.
    """
    with torch.no_grad():
        _run(chunks, batches, routes, live, attached, expect, keep)


def training_step(
    chunks: list[torch.nn.Module],
    optimizer: Any,
    batches: Sequence[MicroBatch],
    routes: Routes | None,
    *,
    objective: Objective = lambda batch, losses: losses,
    attached: Attached | None = None,
    expect: Expect = lambda replay: None,
    keep: Keep = lambda batch, losses: None,
) -> float:
    """Run all micro-batches forward and backward and step the optimizer; return the norm of the gradient.

    The loss is the mean of `objective` over the tokens of the loss mask; as it is, the mean negative log-probability.
    chunks: wrapped in Megatron's data parallelism. routes: None to let the routers select. For the rest see `forward`.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()
    _run(chunks, batches, routes, routes is None, attached, expect, keep, objective)
    return float(optimizer.step()[1])


def _run(
    chunks: list[torch.nn.Module],
    batches: Sequence[MicroBatch],
    routes: Routes | None,
    live: bool,
    attached: Attached | None,
    expect: Expect,
    keep: Keep,
    objective: Objective | None = None,
) -> None:
    """Run all micro-batches; backward too if there is an objective."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(
        iterator: Iterator[tuple[MicroBatch, ReplayBatch | None]], model: Any, return_schedule_plan: bool = False
    ) -> Any:
        batch, replay = next(iterator)
        arguments: dict[str, Any] = {}
        if replay is not None:
            expect(replay)
            if not live and attached is None:
                arguments = replay.model_arguments
        if return_schedule_plan and batch.temperatures is not None:
            raise ReplayError(
                "overlap_moe_expert_parallel_comm=True and a rollout at temperatures other than 1: "
                "a schedule plan computes the loss after the call that would divide its logits"
            )
        with scored_at(model, batch):
            # The overlapped expert-parallel schedule runs the layers itself, by a plan in place of the output.
            output = (model.build_schedule_plan if return_schedule_plan else model)(
                batch.tokens,
                batch.positions,
                None,
                labels=batch.labels,
                packed_seq_params=batch.packed_seq_params(),
                **arguments,
            )

        def loss(losses: torch.Tensor, non_loss_data: bool = False) -> Any:
            keep(batch, losses)
            if non_loss_data or objective is None:
                return losses
            total = (objective(batch, losses.float()) * batch.loss_mask).sum()
            return total, batch.loss_mask.sum().to(torch.int), {}

        return output, loss

    own: Sequence[Sequence[ReplayBatch | None]] = routes or [[None] * len(batches) for _ in chunks]
    iterators = [iter(zip(batches, each, strict=True)) for each in own]
    handed: AbstractContextManager[None] = nullcontext()
    if attached is not None and routes is not None and not live:
        handed = attached.replaying(routes)
    with routed_live(chunks) if live else handed:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=max(each.packing.padded_lengths[0] for each in batches),
            micro_batch_size=batches[0].packing.num_samples,
            forward_only=objective is None,
            collect_non_loss_data=objective is None,
        )
    if not live:
        check_dispatch(chunks)
