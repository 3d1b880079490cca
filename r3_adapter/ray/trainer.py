"""The ranks of a trainer as Ray actors, and the group of them as the driver sees it."""

import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from r3_adapter.errors import R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.trainer import Item, PolicyOptions, PolicyTrainer, StepMetrics
from r3_adapter.ray.faults import RankLost, cause_of, reason
from r3_adapter.ray.store import SampleRef, get_samples
from r3_adapter.rollout import unrouted
from r3_adapter.runs.checkpoints import Seal, seal
from r3_adapter.runs.disk import writing


@dataclass(frozen=True)
class ItemRef:
    """A sample to train on, by reference."""

    ref: SampleRef
    advantage: float
    weight: float


@dataclass(frozen=True)
class Spoken:
    """A conversation without routes, for supervised training; sampled: which tokens the loss is taken over."""

    tokens: Sequence[int]
    sampled: Sequence[bool]


@ray.remote
class TrainerActor:
    """One rank of the trainer."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._batches: list[list[Item]] = []
        self._seconds = 0.0

    def meeting_point(self) -> str:
        """Return a URL at which a process group can meet on this actor's host."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def start(
        self,
        checkpoint: str,
        layout: ParallelLayout,
        rendezvous: str,
        options: PolicyOptions,
        reference: str | None,
        version: int,
        resume: bool,
    ) -> list[int]:
        """Join the process group and build the model; return the global MoE layers of this rank."""
        folder = Path(checkpoint)
        self._trainer = PolicyTrainer(
            folder,
            layout,
            self._rank,
            rendezvous,
            options,
            reference=Path(reference) if reference else None,
            version=version,
        )
        self._coords = layout.coords(self._rank)
        if resume:
            self._trainer.load_optimizer(folder)
        return self._trainer.layer_ids()

    def load(self, micro_batches: Sequence[Sequence[ItemRef]], *, timeout: float) -> tuple[dict[int, str], int]:
        """Get this rank's share of a batch; return what is wrong with samples, by their place, and bytes of the rest.

        There is no collective in it: where one rank finds something wrong, no other waits for it.
        """
        start = time.perf_counter()
        items = [item for batch in micro_batches for item in batch]
        samples, problems = get_samples([item.ref for item in items], self._coords.pp_rank, timeout=timeout)
        if not problems:
            found = iter(zip(items, samples, strict=True))
            self._batches = [
                [Item(sample, item.advantage, item.weight) for item, sample in (next(found) for _ in batch)]
                for batch in micro_batches
            ]
        self._seconds = time.perf_counter() - start
        return problems, sum(sample.trace.topk_ids.nbytes for sample in samples)

    def step(self, *, count_agreement: bool) -> StepMetrics:
        """Train on what was loaded last."""
        metrics = self._trainer.step(self._batches, count_agreement=count_agreement)
        device = self._trainer.device
        metrics.gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        metrics.seconds["transport"] = self._seconds
        self._batches = []
        return metrics

    def fit(self, micro_batches: Sequence[Sequence[Spoken]]) -> tuple[float, float]:
        """Make a supervised step; return the mean loss and the gradient's norm."""
        return self._trainer.fit(
            [[Item(unrouted(each.tokens, each.sampled), 0.0) for each in batch] for batch in micro_batches]
        )

    def export(self, folder: str) -> int:
        """Write this rank's share of the weights; return its bytes."""
        with writing(Path(folder)):
            return sum(path.stat().st_size for path in self._trainer.export(Path(folder)))

    def save(self, folder: str) -> dict[str, Seal]:
        """Write this rank's share of a checkpoint, and have it on the disk; return what the manifest says of it."""
        with writing(Path(folder)):
            return {path.name: seal(path) for path in self._trainer.save(Path(folder))}


class TrainerGroup:
    """All ranks of a trainer; every method asks all of them and waits for all.

    layers: the global MoE layers of each pipeline stage.

    Raises:
        RankLost: from every method, if a rank fails or does not answer within `timeout` seconds; then the group is of
            no use any more: the others may wait for the lost one. Close it.
        R3Error: what a rank says of wrong input; the group is of no use then either.
    """

    def __init__(
        self,
        layout: ParallelLayout,
        checkpoint: Path,
        options: PolicyOptions,
        *,
        reference: Path | None = None,
        version: int = 0,
        resume: bool = False,
        timeout: float = 600,
        num_gpus: float = 0,
    ) -> None:
        self.layout, self._timeout = layout, timeout
        self._meeting = tempfile.TemporaryDirectory(prefix="r3-", ignore_cleanup_errors=True)
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        self.ranks: list[Any] = [
            TrainerActor.options(num_cpus=1, num_gpus=num_gpus, runtime_env=environment).remote(rank)  # type: ignore[attr-defined]
            for rank in range(layout.world_size)
        ]
        try:
            where = self._rendezvous()
            arguments = (
                str(checkpoint),
                layout,
                where,
                options,
                str(reference) if reference else None,
                version,
                resume,
            )
            found = self._ask("start", *arguments)
        except R3Error:
            self.close()
            raise
        stage = layout.stage_size
        self.layers = [sorted(set().union(*found[i * stage : (i + 1) * stage])) for i in range(layout.pp)]

    def load(
        self, plan: Sequence[Sequence[Sequence[ItemRef]]], *, timeout: float
    ) -> tuple[dict[str, tuple[SampleRef, str]], int]:
        """Let every rank get its share; plan: the micro-batches of each data-parallel rank.

        Returns:
            The samples that something is wrong with, by name, and what; and the bytes of routes that all ranks have.
        """
        wanted = [
            rank.load.remote(plan[self.layout.coords(number).dp_rank], timeout=timeout)
            for number, rank in enumerate(self.ranks)
        ]
        problems: dict[str, tuple[SampleRef, str]] = {}
        total = 0
        for number, (wrong, num_bytes) in enumerate(self._all(wanted)):
            mine = [item.ref for batch in plan[self.layout.coords(number).dp_rank] for item in batch]
            problems |= {mine[place].name: (mine[place], f"rank {number}: {why}") for place, why in wrong.items()}
            total += num_bytes
        return problems, total

    def step(self, *, count_agreement: bool) -> list[StepMetrics]:
        """Train on what was loaded; return the metrics of every rank."""
        found: list[StepMetrics] = self._ask("step", count_agreement=count_agreement)
        return found

    def fit(self, plan: Sequence[Sequence[Sequence[Spoken]]]) -> tuple[float, float]:
        """Make a supervised step; return the mean loss and the gradient's norm."""
        wanted = [rank.fit.remote(plan[self.layout.coords(n).dp_rank]) for n, rank in enumerate(self.ranks)]
        found = self._all(wanted)
        losses = [loss for loss, _ in found if loss]
        return sum(losses) / max(1, len(losses)), found[0][1]

    def export(self, folder: Path) -> int:
        """Write the weights as a checkpoint; return its bytes."""
        return sum(self._ask("export", str(folder)))

    def save(self, folder: Path) -> dict[str, Seal]:
        """Write weights and optimizer; return what the manifest says of all files."""
        return {name: sealed for written in self._ask("save", str(folder)) for name, sealed in written.items()}

    def close(self) -> None:
        """End all ranks, whatever they are doing."""
        for rank in self.ranks:
            ray.kill(rank)
        self._meeting.cleanup()

    def _ask(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        wanted = [getattr(rank, method).remote(*arguments, **options) for rank in self.ranks]
        return self._all(wanted)

    def _all(self, wanted: Sequence["ray.ObjectRef[Any]"]) -> list[Any]:
        """Wait for all, one for each rank; raise as soon as one fails, since the others may wait for it without end."""
        waiting, deadline = list(wanted), time.monotonic() + self._timeout
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(wanted.index(ref)) for ref in waiting)
                raise RankLost(f"rank {late}: no answer in {self._timeout:g} s")
            for ref in ready:
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    cause = cause_of(error)
                    if isinstance(cause, R3Error):
                        raise R3Error(str(cause)) from error
                    raise RankLost(f"rank {wanted.index(ref)}: {reason(error)}") from error
        return list(ray.get(list(wanted)))

    def _rendezvous(self) -> str:
        """Ranks of one host meet in a file, so that no port is opened for it."""
        hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        if len(hosts) == 1:
            return f"file://{self._meeting.name}/rendezvous"
        return str(ray.get(self.ranks[0].meeting_point.remote(), timeout=self._timeout))
