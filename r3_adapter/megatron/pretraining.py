"""Replay in megatron.training's loop: each step's routes are checked and cut before its schedule runs.

Megatron's loop calls one function for a step's forward and backward passes. `prepared` wraps it: all micro-batches of
the step are read, their routes checked and cut for each model chunk, and all ranks agree, before the first pass.

Every rank reads its own samples. In Megatron's own scripts only tensor rank 0 of the first and last pipeline stage
does. Here each rank needs the routes of its own layers and rows, and the files name their tokens and layers, so no
broadcast is needed that could mix them up.

N: tokens of a micro-batch that have a loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from r3_adapter.errors import ReplayError, check_choice
from r3_adapter.megatron.agreement import agreed_step
from r3_adapter.megatron.batches import MicroBatch
from r3_adapter.megatron.replay import Staleness, check_dispatch, prepare, step_terms, with_plans
from r3_adapter.megatron.replay_batch import ReplayBatch
from r3_adapter.rollout import Sample

ROW_KINDS = ("replayed", "live", "padding", "stale")


@dataclass(frozen=True)
class PreparedBatch:
    """What a chunk's forward step takes from its iterator.

    samples: of the micro-batch, in order.
    replay: None where routers select themselves.
    rows: [5] float32; how many rows are of each of ROW_KINDS, which overlap, and how many there are, on all
        tensor-parallel ranks together. None where routers select themselves.
    """

    samples: list[Sample]
    batch: MicroBatch
    replay: ReplayBatch | None
    rows: torch.Tensor | None = None

    @property
    def model_arguments(self) -> dict[str, torch.Tensor]:
        """Return the arguments of GPTModel.forward that replay adds."""
        return {} if self.replay is None else self.replay.model_arguments

    @property
    def rollout_logprobs(self) -> torch.Tensor:
        """Return [N] float32, the rollout's log-probability of each label with a loss, in the loss mask's order."""
        owner, position = self.batch.places[self.batch.loss_mask.cpu().numpy() > 0].T
        # A row's label is the next token.
        found = [
            self.samples[i].logprobs[at + 1 - self.samples[i].num_prompt_tokens]
            for i, at in zip(owner, position, strict=True)
        ]
        return torch.tensor(np.array(found, np.float32), device=self.batch.tokens.device)

    @property
    def row_shares(self) -> dict[str, torch.Tensor]:
        """Return [rows of the kind, all rows] by name: Megatron reports such pairs as their ratio."""
        if self.rows is None:
            return {}
        shares = torch.stack([self.rows[:-1], self.rows[-1:].expand(len(ROW_KINDS))], dim=1)
        return {f"r3 rows {kind}": share for kind, share in zip(ROW_KINDS, shares, strict=True)}


def prepared(
    schedule: Callable[..., Any],
    to_batch: Callable[[list[Sample]], MicroBatch],
    *,
    replay: bool,
    weight_version: str | None = None,
    staleness: Staleness = "refuse",
) -> Callable[..., Any]:
    """Return a forward-backward function of Megatron's that first prepares its whole step.

    The data iterators that it is given must yield lists of samples; forward steps get PreparedBatch of theirs.

    schedule: Megatron's function.
    to_batch: builds a micro-batch of samples.
    replay: whether to replay, or only to read.
    weight_version, staleness: as for `prepare`.

    Raises:
        R3Error: On every rank, what the ranks that refuse have said; no pass has begun then. Or, after the passes and
            before the optimizer's step, that tokens were sent by a plan that was not theirs.
    """
    check_choice("staleness", staleness, Staleness, ReplayError)

    def run(*, data_iterator: Any, model: Any, num_microbatches: int, **arguments: Any) -> Any:
        chunks = list(model) if isinstance(model, list) else [model]
        # With VPP each chunk has an iterator over the same samples; one is enough, and only that one is advanced.
        samples = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        steps, why_not = agreed_step(
            lambda: _prepare_all(chunks, samples, num_microbatches),
            lambda steps: step_terms(chunks, num_microbatches, plan=replay),
        )
        iterators = [iter(step) for step in (_with_rows(_with_plans(chunks, steps, why_not)) if replay else steps)]
        output = schedule(
            data_iterator=iterators if isinstance(model, list) and len(chunks) > 1 else iterators[0],
            model=model,
            num_microbatches=num_microbatches,
            **arguments,
        )
        if replay:
            check_dispatch(chunks)
        return output

    def _prepare_all(
        chunks: Sequence[torch.nn.Module], samples: Iterator[list[Sample]], num_microbatches: int
    ) -> list[list[PreparedBatch]]:
        steps: list[list[PreparedBatch]] = [[] for _ in chunks]
        for index in range(num_microbatches):
            taken = next(samples, None)
            if taken is None:
                raise ReplayError(f"micro-batch {index} of {num_microbatches}: no samples are left")
            batch = to_batch(taken)
            for chunk, step in zip(chunks, steps, strict=True):
                routes = None
                if replay:
                    routes = prepare(
                        chunk,
                        batch.traces,
                        batch.tokens,
                        packing=batch.packing,
                        weight_version=weight_version,
                        staleness=staleness,
                        place=f"micro-batch {index}",
                    )
                step.append(PreparedBatch(taken, batch, routes))
        return steps

    return run


def _with_plans(
    chunks: Sequence[torch.nn.Module], steps: list[list[PreparedBatch]], why_not: str
) -> list[list[PreparedBatch]]:
    """Plan the dispatch of a step, if all ranks would. steps: with routes."""
    routes = [[each.replay for each in step if each.replay is not None] for step in steps]
    planned = with_plans(chunks, routes, why_not)
    return [
        [replace(each, replay=replay) for each, replay in zip(step, theirs, strict=True)]
        for step, theirs in zip(steps, planned, strict=True)
    ]


def _with_rows(steps: list[list[PreparedBatch]]) -> list[list[PreparedBatch]]:
    """Count the rows of each micro-batch over tensor-parallel ranks, each of which has some of them.

    Megatron sums what it reports over the others. One small all-reduce a step, if there is more than one such rank.
    """
    from megatron.core import parallel_state as ps

    counts = [_row_counts(each.replay) for each in steps[0] if each.replay is not None]
    rows = torch.tensor(counts, dtype=torch.float32, device=torch.cuda.current_device())
    if ps.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(rows, group=ps.get_tensor_model_parallel_group())
    return [[replace(each, rows=count) for each, count in zip(step, rows, strict=True)] for step in steps]


def _row_counts(replay: ReplayBatch) -> list[int]:
    routes = replay.routes
    return [routes.num_replayed, routes.num_live, routes.num_padding, replay.num_stale, len(routes.row_versions)]
