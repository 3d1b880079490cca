"""One rank of a policy's trainer: old log-probabilities, optimizer steps, and weights out again.

N: sampled tokens of a micro-batch.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch

from r3_adapter.arena import Arena
from r3_adapter.balance.table import FILE
from r3_adapter.errors import ReplayError, check_choice
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.batches import MicroBatch, packed_micro_batch
from r3_adapter.megatron.layers import moe_routers, unwrapped
from r3_adapter.megatron.monitor import RouterMonitor, expert_counter, router_clock
from r3_adapter.megatron.placed import placement_of
from r3_adapter.megatron.policy_trainer.build import build_model, build_optimizer, initialize
from r3_adapter.megatron.policy_trainer.checkpoint import template
from r3_adapter.megatron.policy_trainer.export import export_weights
from r3_adapter.megatron.policy_trainer.learning_rate import LearningRate
from r3_adapter.megatron.policy_trainer.moments import load_moments, save_moments
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.step import Routes, forward, training_step
from r3_adapter.megatron.replay import Staleness, prepare_step
from r3_adapter.megatron.replay_batch import ReplayBatch, StepInput
from r3_adapter.metrics import Gap, gap
from r3_adapter.rl.losses import Objective, TokenColumns, k3, policy_loss
from r3_adapter.rollout import Sample

Replay = Literal["off", "r2", "r3"]


@dataclass(frozen=True)
class PolicyOptions:
    """How the policy is trained, apart from its layout.

    replay: "r3" replays the rollout's routes, in the pass for old log-probabilities too; "r2" those of that pass.
    staleness: what becomes of rows of other weights than the trainer's; with "r3" only.
    num_steps: optimizer steps on a batch, each on an equal share of its micro-batches.
    cpu_offload: keep the optimizer's state on the host.

    Raises:
        ReplayError: a kind of replay or of staleness that is not known.
    """

    objective: Objective = field(default_factory=Objective)
    replay: Replay = "off"
    staleness: Staleness = "refuse"
    num_steps: int = 1
    lr: LearningRate = field(default_factory=LearningRate)
    clip_grad: float = 1.0
    cpu_offload: bool = False
    trainer: TrainerOptions = field(default_factory=lambda: TrainerOptions(qkv_format="thd"))

    def __post_init__(self) -> None:
        check_choice("replay", self.replay, Replay, ReplayError)
        check_choice("staleness", self.staleness, Staleness, ReplayError)


@dataclass(frozen=True)
class Item:
    """A sample to train on; weight: of each of its tokens in the loss."""

    sample: Sample
    advantage: float
    weight: float = 1.0


@dataclass
class StepMetrics:
    """What a rank found in a step; counts are of this rank's share, so that those of all ranks add up.

    gap: of old and rollout log-probabilities; None where another rank knows them.
    kl_ref, nll: sums over the same tokens, of k3 to the reference, if there is one, and of the negative
        log-probability. loss: a sum over the tokens trained on.
    rows: replayed, live, padding, stale; on the first pipeline stage.
    micro_batches: all, those whose dispatch was planned from their routes, and the others by `Plan.kind`; on the first
        pipeline stage.
    lr: of the last optimizer step.
    expert_load: by layer, the tokens that this rank's experts were given by their dispatcher in each micro-batch of the
        pass for old log-probabilities.
    agreement: ids of the routes, and how many of them live routers use, by layer; where counted.
    gpu: its name, "" on a CPU.
    seconds: by stage. "replay" is what routers take longer than live ones, measured where agreement was counted last.
    """

    gap: Gap | None = None
    loss: float = 0.0
    kl_ref: float | None = None
    num_clipped: int = 0
    num_trained: int = 0
    nll: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    lr: float = 0.0
    rows: dict[str, int] = field(default_factory=dict)
    micro_batches: dict[str, int] = field(default_factory=dict)
    expert_load: dict[int, list[int]] = field(default_factory=dict)
    agreement: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    resident_bytes: int = 0
    gpu: str = ""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of what is done inside to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class PolicyTrainer:
    """A policy, and a reference model if the objective has one, on this rank of a layout.

    version: the number of the weights; the engine's name for them is its text.
    """

    def __init__(
        self,
        checkpoint: Path,
        layout: ParallelLayout,
        rank: int,
        rendezvous: str,
        options: PolicyOptions,
        *,
        reference: Path | None = None,
        version: int = 0,
    ) -> None:
        self.layout, self.rank, self.options, self.version = layout, rank, options, version
        self._template = template(checkpoint, rank=rank, num_ranks=layout.world_size)
        self.device = initialize(layout, rank, rendezvous)
        chunks = build_model(checkpoint, layout, options.trainer)
        self.chunks, self.optimizer = build_optimizer(
            chunks,
            distributed=options.trainer.distributed_optimizer,
            lr=options.lr.peak,
            min_lr=options.lr.least,
            clip_grad=options.clip_grad,
            cpu_offload=options.cpu_offload,
        )
        self._scheduler = options.lr.scheduler(self.optimizer)
        self.placement = placement_of(unwrapped(self.chunks[0]))
        self.reference = build_model(reference, layout, options.trainer) if reference else None
        self._replay_seconds_per_token = 0.0
        self._arena = Arena(_pinned if self.device.type == "cuda" else None)

    def layer_ids(self) -> list[int]:
        """Return the global MoE layers of this rank."""
        return sorted(layer for chunk in self.chunks for layer, _ in moe_routers(chunk))

    def step(self, micro_batches: Sequence[Sequence[Item]], *, count_agreement: bool = False) -> StepMetrics:
        """Train on a batch: the micro-batches of this data-parallel rank, in order.

        count_agreement: run the first micro-batches once more with live routers, and compare them with the routes.

        Raises:
            R3Error: on every rank, if the routes of one are not its tokens', layers' or weights'; nothing is trained.
        """
        metrics = StepMetrics()
        with metrics.timed("repack"):
            batches = self._batches(micro_batches)
            routes = self._routes(batches, metrics)
        live = self.options.replay != "r3"
        old, recorder = _Logprobs(), RouterMonitor(record=self.options.replay == "r2")
        watched = recorder.watch(self.chunks) if live else nullcontext()
        with metrics.timed("old_logprobs"), watched, expert_counter(self.chunks) as metrics.expert_load:
            forward(self.chunks, batches, routes, live=live, expect=recorder.expect, keep=old.keep)
        if self.options.replay == "r2":
            routes = recorder.recorded(routes)
        if not live and count_agreement:
            with metrics.timed("agreement"):
                self._count_agreement(batches, routes, metrics)
        elif live:
            metrics.agreement = {layer: (found.ids, found.ids_equal) for layer, found in recorder.layers.items()}
        reference = _Logprobs()
        if self.reference:
            with metrics.timed("reference"):
                forward(self.reference, batches, routes, live=True, keep=reference.keep)
        columns = self._columns(micro_batches, batches, old, reference, metrics)
        self._train(batches, routes if self.options.replay != "off" else None, columns, metrics)
        if not live:
            # The pass for old log-probabilities, and the forward pass of training.
            tokens = 2 * sum(batch.packing.num_tokens for batch in batches)
            metrics.seconds["replay"] = self._replay_seconds_per_token * tokens
        self.version += 1
        metrics.resident_bytes = psutil.Process().memory_info().rss
        return metrics

    def fit(self, micro_batches: Sequence[Sequence[Item]]) -> tuple[float, float]:
        """Make one supervised step with live routers; return this rank's mean loss (0 without one) and grad norm."""
        batches, found = self._batches(micro_batches), _Logprobs()
        norm = training_step(self.chunks, self.optimizer, batches, None, keep=found.keep)
        values = [logprobs for logprobs in found.by_batch.values() if len(logprobs)]
        return (-float(torch.cat(values).mean()) if values else 0.0), norm

    def export(self, folder: Path) -> list[Path]:
        """Write this rank's share of the weights, see export_weights; return the files that this rank has written."""
        return export_weights(self.chunks, self._template, folder)

    def save(self, folder: Path) -> list[Path]:
        """Write the weights and this rank's optimizer into a folder, complete when all ranks have returned.

        Returns:
            The files that this rank has written.
        """
        written = self.export(folder)
        path = folder / f"optimizer.{self.rank}.pt"
        written.append(save_moments(self.optimizer, path, self._about(), self._counts()))
        if self.rank == 0 and self.placement is not None:
            written.append(self.placement.save(folder / FILE))
        return written

    def load_optimizer(self, folder: Path) -> None:
        """Read back what save wrote; the weights come with the constructor, whose checkpoint is the same folder.

        Raises:
            ReplayError: another layout's, or of experts that lie elsewhere.
        """
        path = folder / f"optimizer.{self.rank}.pt"
        counts = load_moments(self.optimizer, path, self._about(), self.device)
        self.version = counts["version"]
        # The rate itself follows from the options and from how many optimizer steps there were.
        self._scheduler.step(counts["num_steps"])

    def _counts(self) -> dict[str, int]:
        return {"version": self.version, "num_steps": self._scheduler.num_steps}

    def _about(self) -> dict[str, str | None]:
        """Return what the optimizer's state depends on."""
        return {"layout": str(self.layout), "placement": None if self.placement is None else self.placement.digest()}

    def _batches(self, micro_batches: Sequence[Sequence[Item]]) -> list[MicroBatch]:
        cp_cut = self.options.trainer.cp_cut
        return [
            packed_micro_batch([item.sample for item in items], self.layout, self.rank, self.device, cp_cut=cp_cut)
            for items in micro_batches
        ]

    def _routes(self, batches: Sequence[MicroBatch], metrics: StepMetrics) -> list[list[ReplayBatch]]:
        replaying = self.options.replay == "r3"
        routes = prepare_step(
            self.chunks,
            [StepInput(each.traces, each.tokens, each.packing) for each in batches],
            weight_version=str(self.version),
            # Without replay the routes are looked at only, to say how far live routers are from them.
            staleness=self.options.staleness if replaying else "keep",
            layout=self.layout,
            arena=self._arena,
            plan=replaying and self.options.trainer.dispatch_plan,
        )
        if self.layout.coords(self.rank).pp_rank == 0:
            first = [batch.routes for batch in routes[0]]
            metrics.rows = {
                "replayed": sum(each.num_replayed for each in first) if replaying else 0,
                "live": sum(each.num_live + (0 if replaying else each.num_replayed) for each in first),
                "padding": sum(each.num_padding for each in first),
                "stale": sum(batch.num_stale for batch in routes[0]),
            }
            kinds = Counter(batch.plan.kind for batch in routes[0])
            planned = kinds.pop("planned", 0)
            why_not = {f"unplanned_{kind}": count for kind, count in sorted(kinds.items())}
            metrics.micro_batches = {"all": len(first), "planned": planned, **why_not}
        return routes

    def _count_agreement(self, batches: Sequence[MicroBatch], routes: Routes, metrics: StepMetrics) -> None:
        """Run the first micro-batches with live routers, and time the routers both ways."""
        # Interleaved schedules want a multiple of the pipeline's size.
        first = slice(self.layout.pp if self.layout.vpp > 1 else 1)
        some, theirs = batches[first], [each[first] for each in routes]
        monitor = RouterMonitor()
        with monitor.watch(self.chunks):
            forward(self.chunks, some, theirs, live=True, expect=monitor.expect)
        metrics.agreement = {layer: (found.ids, found.ids_equal) for layer, found in monitor.layers.items()}
        spent = {}
        for live in (True, False):
            with router_clock(self.chunks) as clock:
                forward(self.chunks, some, theirs, live=live)
            spent[live] = clock[0]
        tokens = sum(batch.packing.num_tokens for batch in some)
        self._replay_seconds_per_token = max(0.0, spent[False] - spent[True]) / tokens

    def _columns(
        self,
        micro_batches: Sequence[Sequence[Item]],
        batches: Sequence[MicroBatch],
        old: "_Logprobs",
        reference: "_Logprobs",
        metrics: StepMetrics,
    ) -> dict[int, TokenColumns]:
        """Return, on ranks that have the loss, what it needs of each micro-batch, by the micro-batch's id()."""
        columns = {}
        for items, batch in zip(micro_batches, batches, strict=True):
            if id(batch) in old.by_batch:
                theirs = reference.by_batch.get(id(batch))
                columns[id(batch)] = token_columns(items, batch, old.by_batch[id(batch)], theirs)
        if columns and self.layout.coords(self.rank).tp_rank == 0:
            ours = torch.cat([each.old for each in columns.values()]).cpu().numpy()
            rollout = torch.cat([each.rollout for each in columns.values()]).cpu().numpy()
            if len(ours):
                metrics.gap, metrics.nll = gap(ours, rollout), -float(ours.sum())
            scored = [k3(each.old, each.reference) for each in columns.values() if each.reference is not None]
            metrics.kl_ref = sum(float(values.sum()) for values in scored) if scored else None
        return columns

    def _train(
        self,
        batches: Sequence[MicroBatch],
        routes: Routes | None,
        columns: Mapping[int, TokenColumns],
        metrics: StepMetrics,
    ) -> None:
        first_of_tp = self.layout.coords(self.rank).tp_rank == 0

        def objective(batch: MicroBatch, losses: torch.Tensor) -> torch.Tensor:
            chosen, mine = batch.loss_mask > 0, columns[id(batch)]
            loss, cut = policy_loss(
                self.options.objective, -losses[chosen], mine, batch.packing.num_samples, self._sum_over_cp
            )
            if first_of_tp:
                metrics.loss += float(loss.detach().sum())
                metrics.num_clipped += int(cut.sum())
                metrics.num_trained += len(loss)
            return torch.zeros_like(losses).masked_scatter(chosen, loss)

        share, rest = divmod(len(batches), self.options.num_steps)
        if rest:
            raise ReplayError(f"{len(batches)} micro-batches are not a multiple of {self.options.num_steps} steps")
        with metrics.timed("train"):
            for start in range(0, len(batches), share):
                part = slice(start, start + share)
                metrics.lr = self._scheduler.get_lr({})
                metrics.grad_norms.append(
                    training_step(
                        self.chunks,
                        self.optimizer,
                        batches[part],
                        None if routes is None else [each[part] for each in routes],
                        objective=objective,
                    )
                )
                self._scheduler.step(1)

    def _sum_over_cp(self, values: torch.Tensor) -> torch.Tensor:
        if self.layout.cp > 1:
            from megatron.core import parallel_state as ps

            torch.distributed.all_reduce(values, group=ps.get_context_parallel_group())
        return values


def _pinned(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory that a GPU copies from without a stage between."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


class _Logprobs:
    """Keeps [N] log-probabilities of each micro-batch's sampled tokens, by its id(), in the order of its loss mask."""

    def __init__(self) -> None:
        self.by_batch: dict[int, torch.Tensor] = {}

    def keep(self, batch: MicroBatch, losses: torch.Tensor) -> None:
        self.by_batch[id(batch)] = -losses.detach().float()[batch.loss_mask > 0]


def token_columns(
    items: Sequence[Item], batch: MicroBatch, old: torch.Tensor, reference: torch.Tensor | None
) -> TokenColumns:
    """Return what the loss needs of each sampled token of a micro-batch that this rank has."""
    owner, position = batch.places[batch.loss_mask.cpu().numpy() > 0].T
    samples = [item.sample for item in items]
    offsets = np.cumsum([0, *(sample.num_response_tokens for sample in samples[:-1])])
    prompts = np.array([sample.num_prompt_tokens for sample in samples])
    # A row's label is the next token.
    at = offsets[owner] + position + 1 - prompts[owner]
    rollout = np.concatenate([sample.logprobs for sample in samples])[at]

    def column(values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(old.device)

    return TokenColumns(
        owner=column(owner),
        advantage=column(np.array([item.advantage for item in items], np.float32)[owner]),
        weight=column(np.array([item.weight for item in items], np.float32)[owner]),
        rollout=column(rollout),
        old=old,
        reference=reference,
    )
