"""The loop of an RL run: roll out, train with the routes replayed, hand the weights back, and go on after faults."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.errors import R3Error
from r3_adapter.ray.batch import items_of, metrics_of, share_out
from r3_adapter.ray.faults import RankLost
from r3_adapter.ray.options import LoopOptions, check_same_run
from r3_adapter.ray.pool import RolloutPool
from r3_adapter.ray.rollout import Group, Rollout
from r3_adapter.ray.trainer import TrainerGroup
from r3_adapter.rl.tasks import task_named
from r3_adapter.runs.checkpoints import Checkpoints, Found
from r3_adapter.runs.files import read_config
from r3_adapter.runs.log import RunLog, check_free

_RESTARTS = 3


class Loop:
    """A run. `observe` is told the step and what is about to happen, before it does: for tests and progress bars.

    first: the step at which it begins, after the newest checkpoint that is whole.

    Raises:
        R3Error: the run that is in the folder is another, has no whole checkpoint, or has more steps already.
    """

    def __init__(self, options: LoopOptions, observe: Callable[["Loop", int, str], None] = lambda *_: None) -> None:
        self.options, self.observe = options, observe
        self.trainers: TrainerGroup | None = None
        self.pool: RolloutPool | None = None
        self.last_metrics: Mapping[str, Any] = {}
        self._task = task_named(options.task)
        self._log: RunLog | None = None
        self.checkpoints = Checkpoints(options.folder)
        self._about = {"layout": str(options.layout)}
        self._config = {**options.config, "options": options.fixed()}
        check_free(options.folder)
        self._begun = (options.folder / "config.json").exists()
        if self._begun:
            before = read_config(options.folder / "config.json")
            check_same_run(options.folder, before.get("options", {}), options.fixed())
        self._found = self.checkpoints.newest(self._about)
        if self._found and not self._begun:
            raise R3Error(f"{self.checkpoints.folder}: has checkpoints of a run whose config.json is not there")
        self.first = self.step = self._found.step if self._found else 0
        if self.first > options.num_rollouts:
            raise R3Error(f"{options.folder}: is at step {self.first} > {options.num_rollouts}, the steps of the run")

    def run(self) -> None:
        """Run all steps, from the last checkpoint in the run's folder if there is one.

        Raises:
            R3Error: routes that cannot be replayed and cannot be had again, or a trainer that is lost again and again.
        """
        restarts: dict[int, int] = {}
        resume_at = self.first if self._begun else None
        while True:
            try:
                with RunLog(self.options.folder, self._config, resume_at=resume_at) as log:
                    self._log = log
                    try:
                        return self._run(self._set_damaged_aside(), log)
                    except RankLost as lost:
                        log.event(self.step, "trainer_restarted", str(lost))
                        raise
            except RankLost as lost:
                self._found = self.checkpoints.newest(self._about)
                resume_at = self._found.step if self._found else 0
                restarts[resume_at] = restarts.get(resume_at, 0) + 1
                if restarts[resume_at] > _RESTARTS:
                    raise R3Error(
                        f"the trainer was lost {_RESTARTS + 1} times after step {resume_at}: {lost}"
                    ) from lost

    def _set_damaged_aside(self) -> Found | None:
        """Say which checkpoints cannot be gone on from; return the one that can."""
        if self._found:
            self.step = self._found.step
            for why in self._found.damaged.values():
                self._event("checkpoint_damaged", f"{why}; going on from step {self.step}")
            self.checkpoints.set_aside(list(self._found.damaged))
        return self._found

    def _run(self, found: Found | None, log: RunLog) -> None:
        options, self.last_metrics = self.options, {}
        first = self.step = found.step if found else 0
        checkpoint = found.folder if found else options.checkpoint
        if first == options.num_rollouts:
            return
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
            for self.step in range(first, options.num_rollouts):
                while submitted <= min(self.step + options.lag, options.num_rollouts - 1):
                    self.pool.submit(submitted, self._groups(submitted))
                    submitted += 1
                metrics = self._one_step()
                log.step(self.step, metrics)
                self.last_metrics = metrics
            self.observe(self, options.num_rollouts, "end")

    def _one_step(self) -> dict[str, Any]:
        assert self.pool is not None and self.trainers is not None
        step, options, start = self.step, self.options, time.perf_counter()
        self.observe(self, step, "rollout")
        rollouts = self.pool.collect(step)
        after_rollout = time.perf_counter()
        items, pulled = self._load(rollouts)
        self.observe(self, step, "train")
        figures = self.trainers.step(count_agreement=step % options.agreement_interval == 0)
        after_train = time.perf_counter()
        self.observe(self, step, "weights")
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
            self.observe(self, self.step, "load")
            problems, pulled = self.trainers.load(plan, timeout=options.timeout / 4)
            if not problems:
                return items, pulled
            for ref, why in problems.values():
                self._event("trace_lost" if "lost: " in why else "trace_damaged", f"{ref.name}: {why}")
            wrong = {ref.group for ref, _ in problems.values()}
            self.pool.submit(self.step, [group for group in self._groups(self.step) if group.number in wrong])
            again = {rollout.number: rollout for rollout in self.pool.collect(self.step)}
            rollouts[:] = [again.get(rollout.number, rollout) for rollout in rollouts]
        raise R3Error(f"step {self.step}: traces still wrong after {_RESTARTS + 1} attempts: {why}")

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
            shutil.rmtree(folder, ignore_errors=True)
            return folder, self.trainers.export(folder)
        folder = self.checkpoints.save(version, self.trainers.save, self._about)
        return folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def _prune(self, latest: Path) -> None:
        """Keep the newest weights, from which an engine may have to start again, and the two newest checkpoints."""
        self.checkpoints.prune()
        for folder in (self.options.folder / "weights").glob("*"):
            if folder != latest:
                shutil.rmtree(folder, ignore_errors=True)

    def _event(self, kind: str, what: str) -> None:
        assert self._log is not None
        self._log.event(self.step, kind, what)
