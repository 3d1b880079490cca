"""The loop of an RL run: roll out, train with the routes replayed, hand the weights back, and go on after faults."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.errors import R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy import PolicyOptions
from r3_adapter.ray.batch import items_of, metrics_of, share_out
from r3_adapter.ray.faults import RankLost
from r3_adapter.ray.pool import RolloutPool
from r3_adapter.ray.rollout import Group, Rollout
from r3_adapter.ray.trainer import TrainerGroup
from r3_adapter.rl.tasks import task_named
from r3_adapter.runs.log import RunLog
from r3_adapter.sglang.sampling import check_engine, checked_params
from r3_adapter.sglang.server_arguments import check_server_arguments
from r3_adapter.sglang.settings import EngineSettings

_RESTARTS = 3


@dataclass(frozen=True)
class LoopOptions:
    """What a run does.

    folder: of the run; weights and checkpoints are in it.
    checkpoint: a Hugging Face checkpoint, the first weights and, if the objective has a KL, the reference.
    engine: settings of each rollout engine; its checkpoint and weight version are set by the loop.
    batch_size: prompts of a step; samples_per_prompt: samples of each.
    lag: steps that rollouts are ahead of the trainer; 0 is on-policy.
    save_interval: steps between checkpoints.
    record: a folder in which all rollouts are kept, a folder of samples for each prompt of each step.
    agreement_interval: steps between counts of the experts that live routers would have used.
    timeout: seconds after which a rank that does not answer is taken for hung, and in which an engine has to start.
    rollout_timeout: seconds in which no prompt gets done, after which an engine is taken for hung.
    """

    folder: Path
    checkpoint: Path
    layout: ParallelLayout
    policy: PolicyOptions
    engine: EngineSettings
    task: str
    sampling_params: Mapping[str, Any]
    num_engines: int = 1
    batch_size: int = 16
    samples_per_prompt: int = 8
    micro_batch_size: int = 8
    lag: int = 0
    num_rollouts: int = 100
    seed: int = 0
    save_interval: int = 20
    record: Path | None = None
    agreement_interval: int = 10
    timeout: float = 600
    rollout_timeout: float = 600
    num_gpus_per_rank: float = 0
    num_gpus_per_engine: float = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_params(self.sampling_params, place="sampling_params")
        check_server_arguments(self.engine.engine_arguments(gpu=True))
        check_engine(self.engine.engine_arguments(gpu=True))
        if self.lag and self.policy.replay == "r3" and self.policy.staleness == "refuse":
            raise R3Error(f"rollouts {self.lag} steps ahead have rows of other weights, which staleness refuse refuses")


def latest_step(folder: Path) -> int:
    """Return the step at which a run goes on: that of its newest checkpoint, 0 if it has none."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("[0-9]*")), default=0)


class Loop:
    """A run. `observe` is told the step and what is about to happen, before it does: for tests and progress bars."""

    def __init__(self, options: LoopOptions, observe: Callable[["Loop", int, str], None] = lambda *_: None) -> None:
        self.options, self._observe = options, observe
        self.trainers: TrainerGroup | None = None
        self.pool: RolloutPool | None = None
        self.last_metrics: Mapping[str, Any] = {}
        self._task = task_named(options.task)
        self._step = 0
        self._log: RunLog | None = None

    def run(self) -> None:
        """Run all steps, from the last checkpoint in the run's folder if there is one.

        Raises:
            R3Error: routes that cannot be replayed and cannot be had again, or a trainer that is lost again and again.
        """
        restarts: dict[int, int] = {}
        resume_at = self._latest()
        while True:
            try:
                with RunLog(self.options.folder, dict(self.options.config), resume_at=resume_at) as log:
                    try:
                        return self._run(resume_at or 0, log)
                    except RankLost as lost:
                        log.event(self._step, "trainer_restarted", str(lost))
                        raise
            except RankLost as lost:
                resume_at = self._latest() or 0
                restarts[resume_at] = restarts.get(resume_at, 0) + 1
                if restarts[resume_at] > _RESTARTS:
                    raise R3Error(
                        f"the trainer was lost {_RESTARTS + 1} times after step {resume_at}: {lost}"
                    ) from lost

    def _run(self, first: int, log: RunLog) -> None:
        options, self._log, self._step, self.last_metrics = self.options, log, first, {}
        checkpoint = self._checkpoint(first) if first else options.checkpoint
        with ExitStack() as stack:
            self.trainers = TrainerGroup(
                options.layout,
                checkpoint,
                options.policy,
                reference=options.checkpoint if options.policy.objective.kl_coef else None,
                version=first,
                resume=first > 0,
                timeout=options.timeout,
                num_gpus=options.num_gpus_per_rank,
            )
            stack.callback(self.trainers.close)
            self.pool = RolloutPool(
                replace(options.engine, model_path=str(checkpoint), weight_version=str(first)),
                options.num_engines,
                options.task,
                options.sampling_params,
                self.trainers.layers,
                timeout=options.timeout,
                idle_timeout=options.rollout_timeout,
                on_event=self._event,
                num_gpus=options.num_gpus_per_engine,
            )
            stack.callback(self.pool.close)
            submitted = first
            for self._step in range(first, options.num_rollouts):
                while submitted <= min(self._step + options.lag, options.num_rollouts - 1):
                    self.pool.submit(submitted, self._groups(submitted))
                    submitted += 1
                metrics = self._one_step()
                log.step(self._step, metrics)
                self.last_metrics = metrics
            self._observe(self, options.num_rollouts, "end")

    def _one_step(self) -> dict[str, Any]:
        assert self.pool is not None and self.trainers is not None
        step, options, start = self._step, self.options, time.perf_counter()
        self._observe(self, step, "rollout")
        rollouts = self.pool.collect(step)
        after_rollout = time.perf_counter()
        items, pulled = self._load(rollouts)
        self._observe(self, step, "train")
        figures = self.trainers.step(count_agreement=step % options.agreement_interval == 0)
        after_train = time.perf_counter()
        self._observe(self, step, "weights")
        folder, num_bytes = self._write_weights(step + 1)
        self.pool.update_weights(folder, str(step + 1))
        self._prune(folder)
        metrics = metrics_of(rollouts, items, figures)
        end = time.perf_counter()
        metrics["weight_version"] = str(step)
        metrics["bytes"] |= {"routes_pulled": pulled, "weights": num_bytes}
        metrics["seconds"] |= {
            "rollout": after_rollout - start,
            "weights": end - after_train,
            "step": end - start,
        }
        return metrics

    def _load(self, rollouts: list[Rollout]) -> tuple[list[Any], int]:
        """Let the trainer get its shares; roll out again, in place, what is lost or damaged on the way."""
        assert self.pool is not None and self.trainers is not None
        options = self.options
        for _ in range(_RESTARTS + 1):
            items = items_of(rollouts, options.policy.objective.estimator)
            plan = share_out(
                items,
                options.layout,
                micro_batch_size=options.micro_batch_size,
                num_steps=options.policy.num_steps,
            )
            self._observe(self, self._step, "load")
            problems, pulled = self.trainers.load(plan, timeout=options.timeout / 4)
            if not problems:
                return items, pulled
            for ref, why in problems.values():
                self._event("trace_lost" if "lost: " in why else "trace_damaged", f"{ref.name}: {why}")
            wrong = {ref.group for ref, _ in problems.values()}
            self.pool.submit(self._step, [group for group in self._groups(self._step) if group.number in wrong])
            again = {rollout.number: rollout for rollout in self.pool.collect(self._step)}
            rollouts[:] = [again.get(rollout.number, rollout) for rollout in rollouts]
        raise R3Error(f"step {self._step}: traces still wrong after {_RESTARTS + 1} attempts: {why}")

    def _groups(self, step: int) -> Sequence[Group]:
        """Return the prompts of a step, the same whenever it is asked for."""
        options, rng = self.options, np.random.default_rng([self.options.seed, step])
        return [
            Group(
                number,
                self._task.prompt(rng),
                options.samples_per_prompt,
                options.record / f"{step:06d}-{number:05d}" if options.record else None,
            )
            for number in range(options.batch_size)
        ]

    def _write_weights(self, version: int) -> tuple[Path, int]:
        """Write the weights, as a checkpoint where one is due; return where, and how many bytes."""
        assert self.trainers is not None
        last = version == self.options.num_rollouts
        if version % self.options.save_interval and not last:
            folder = self.options.folder / "weights" / str(version)
            return folder, self.trainers.export(folder)
        folder, partial = self._checkpoint(version), self.options.folder / "checkpoints" / f"partial-{version}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        num_bytes = self.trainers.save(partial)
        partial.rename(folder)
        return folder, num_bytes

    def _prune(self, latest: Path) -> None:
        """Keep the newest weights, from which an engine may have to start again, and the two newest checkpoints."""
        checkpoints = sorted((self.options.folder / "checkpoints").glob("[0-9]*"))
        for folder in [*(self.options.folder / "weights").glob("*"), *checkpoints[:-2]]:
            if folder != latest:
                shutil.rmtree(folder, ignore_errors=True)

    def _checkpoint(self, version: int) -> Path:
        return self.options.folder / "checkpoints" / f"{version:08d}"

    def _latest(self) -> int | None:
        """Return the step to go on at; None for a new run."""
        begun = (self.options.folder / "config.json").exists()
        return latest_step(self.options.folder) if begun else None

    def _event(self, kind: str, what: str) -> None:
        assert self._log is not None
        self._log.event(self._step, kind, what)
