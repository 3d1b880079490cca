"""The loop of an RL run: roll out, train with the routes replayed, hand the weights back, and go on after faults."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from r3_adapter.balance.loads import Placed
from r3_adapter.balance.table import Table
from r3_adapter.errors import R3Error
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.plan.model import ModelShape
from r3_adapter.ray.balanced import balanced, expert_load
from r3_adapter.ray.batch import Plan, items_of, metrics_of, share_out
from r3_adapter.ray.cluster import spilled_bytes
from r3_adapter.ray.faults import RankLost, told_by_prompt
from r3_adapter.ray.options import LoopOptions, check_same_run
from r3_adapter.ray.pool import RolloutPool
from r3_adapter.ray.prompts import Prompts
from r3_adapter.ray.rollout import Group, Rollout
from r3_adapter.ray.rounded import write_rounded
from r3_adapter.ray.throughput import flops_per_token, throughput
from r3_adapter.ray.trainer import ItemRef, TrainerGroup
from r3_adapter.rl.tasks import task_named
from r3_adapter.runs.checkpoints import Checkpoints, Found
from r3_adapter.runs.files import read_config
from r3_adapter.runs.log import RunLog, check_free
from r3_adapter.runs.trackers import trackers_of

_RESTARTS = 3


class Loop:
    """A run.

    observe: told the step and what is about to happen, before it does: for tests and for whoever watches.
    on_event: told the step, kind and text of each event that is in the run's log.
    first: the step at which it begins, after the newest checkpoint that is whole; begun: the run's folder has a run.

    Raises:
        R3Error: the run that is in the folder is another, has no whole checkpoint, or has more steps already.
    """

    def __init__(
        self,
        options: LoopOptions,
        observe: Callable[["Loop", int, str], None] = lambda *_: None,
        on_event: Callable[[int, str, str], None] = lambda *_: None,
    ) -> None:
        self.options, self.observe, self.on_event = options, observe, on_event
        self.trainers: TrainerGroup | None = None
        self.pool: RolloutPool | None = None
        self.last_metrics: Mapping[str, Any] = {}
        num_held = options.eval_prompts if options.eval_interval else 0
        self._prompts = Prompts(task_named(options.task), options.seed, num_held)
        self._trackers = trackers_of(options.trackers)
        self._expert_at: Placed | None = None
        self._log: RunLog | None = None
        self.checkpoints = Checkpoints(options.folder)
        self._about = {"layout": str(options.layout)}
        self._config = {**options.config, "options": options.fixed()}
        check_free(options.folder)
        self.begun = (options.folder / "config.json").exists()
        if self.begun:
            before = read_config(options.folder / "config.json")
            check_same_run(options.folder, before.get("options", {}), options.fixed())
        self._found = self.checkpoints.newest(self._about)
        if self._found and not self.begun:
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
        resume_at = self.first if self.begun else None
        while True:
            try:
                with RunLog(
                    self.options.folder,
                    self._config,
                    resume_at=resume_at,
                    trackers=self._trackers,
                    on_event=self.on_event,
                ) as log:
                    self._log = log
                    try:
                        return self._run(self._set_damaged_aside(), log)
                    except RankLost as lost:
                        log.event(self.step, "trainer_restarted", f"{lost}; {self._restart_from()}")
                        raise
            except RankLost as lost:
                self._found = self.checkpoints.newest(self._about)
                resume_at = self._found.step if self._found else 0
                restarts[resume_at] = restarts.get(resume_at, 0) + 1
                if restarts[resume_at] > _RESTARTS:
                    raise R3Error(
                        f"the trainer was lost {_RESTARTS + 1} times after step {resume_at}: {lost}"
                    ) from lost

    def _restart_from(self) -> str:
        """Say where the trainer goes on after it was lost."""
        steps = self.checkpoints.steps()
        where = f"from step {steps[-1]}'s checkpoint" if steps else "from the first weights"
        return f"all ranks and engines start again {where}"

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
        policy = self._trained()
        self.observe(self, first, "ranks")
        with ExitStack() as stack:
            self.trainers = TrainerGroup(
                options.layout,
                checkpoint,
                policy,
                reference=options.checkpoint if options.policy.objective.kl_coef else None,
                version=first,
                resume=first > 0,
                timeout=options.timeout,
                num_gpus=options.num_gpus_per_rank,
            )
            stack.callback(self.trainers.close)
            if policy.trainer.place is not None:
                layers = sorted(set().union(*self.trainers.layers))
                self._expert_at = Table.load(Path(policy.trainer.place)).rows(layers)
            self._served = self._for_engines(checkpoint, first)
            self.observe(self, first, "engines")
            self.pool = RolloutPool(
                replace(options.engine, model_path=str(self._served), weight_version=str(first)),
                options.num_engines,
                options.task,
                options.sampling_params,
                self.trainers.layers,
                timeout=options.timeout,
                idle_timeout=options.rollout_timeout,
                on_event=self._event,
                num_gpus=options.num_gpus_per_engine,
                counted=options.balance in ("pack", "place"),
            )
            stack.callback(self.pool.close)
            self._flops = flops_per_token(ModelShape.from_file(checkpoint))
            self.observe(self, first, "ready")
            self._spilled = spilled_bytes()
            submitted = first
            before = self._evaluate(0) if first == 0 else {}
            if before:
                self.last_metrics = before
                self.observe(self, first, "evaluated")
            for self.step in range(first, options.num_rollouts):
                while submitted <= min(self.step + options.lag, options.num_rollouts - 1):
                    self.pool.submit(submitted, self._groups(submitted))
                    submitted += 1
                metrics = self._one_step() | {f"{name}_before": value for name, value in before.items()}
                before = {}
                log.step(self.step, metrics)
                self.last_metrics = metrics
                self.observe(self, self.step, "logged")
                self._look_at_store()
            self.observe(self, options.num_rollouts, "end")

    def _one_step(self) -> dict[str, Any]:
        assert self.pool is not None and self.trainers is not None and self._log is not None
        step, options, start = self.step, self.options, time.perf_counter()
        self.observe(self, step, "rollout")
        rollouts = self.pool.collect(step)
        after_rollout = time.perf_counter()
        items, pulled = self._load(rollouts)
        self._log.samples(step, [shown for rollout in rollouts for shown in rollout.shown])
        self.observe(self, step, "train")
        rank_metrics = self.trainers.step(count_agreement=step % options.agreement_interval == 0)
        after_train = time.perf_counter()
        self.observe(self, step, "weights")
        folder, num_bytes = self._write_weights(step + 1)
        self._served = self._for_engines(folder, step + 1)
        self.pool.update_weights(self._served, str(step + 1))
        self._prune()
        metrics = metrics_of(rollouts, items, rank_metrics)
        if load := expert_load([each.expert_load for each in rank_metrics], options.layout):
            metrics["expert_load"] = asdict(load)
        end = time.perf_counter()
        metrics["weight_version"] = str(step)
        metrics["bytes"] |= {"routes_pulled": pulled, "weights": num_bytes}
        metrics["seconds"] |= {
            "rollout": after_rollout - start,
            "weights": end - after_train,
            "step": end - start,
        }
        metrics["throughput"] = throughput(
            metrics["seconds"],
            response_tokens=metrics["response_tokens"],
            trained_tokens=sum(item.ref.num_tokens for item in items),
            num_ranks=options.layout.world_size,
            num_engine_gpus=options.num_gpus_per_engine * options.num_engines,
            gpu=rank_metrics[0].gpu,
            flops=self._flops,
        )
        if found := self._evaluate(step + 1):
            metrics |= found
            metrics["seconds"]["eval"] = time.perf_counter() - end
        return metrics

    def _look_at_store(self) -> None:
        """Say what has gone from the object store to disk since the step before."""
        before, self._spilled = self._spilled, spilled_bytes()
        if self._spilled > before:
            mib = (self._spilled - before) / (1 << 20)
            what = f"the object store was full, {mib:,.1f} MiB went to disk: nothing is lost, but it takes time"
            self._event("store_spilled", f"{what}; give Ray more --object-store-memory, or a step fewer samples")

    def _evaluate(self, version: int) -> dict[str, float]:
        """Evaluate the weights that the engines have, where it is time to; nothing else."""
        assert self.pool is not None
        every = self.options.eval_interval
        if every is None or (version % every and version != self.options.num_rollouts):
            return {}
        self.observe(self, self.step, "eval")
        return self._prompts.evaluate(self.pool)

    def _load(self, rollouts: list[Rollout]) -> tuple[list[Any], int]:
        """Let the trainer get its shares; roll out again, in place, what is lost or damaged on the way."""
        assert self.pool is not None and self.trainers is not None
        options = self.options
        for _ in range(_RESTARTS + 1):
            items = items_of(rollouts, options.policy.objective.estimator)
            plan = self._plan(items)
            self.observe(self, self.step, "load")
            problems, pulled = self.trainers.load(plan, timeout=options.timeout / 4)
            if not problems:
                return items, pulled
            for kind, what in told_by_prompt(problems.values()):
                self._event(kind, f"{what}; the prompt is rolled out again before the step")
            wrong = {ref.group for ref, _ in problems.values()}
            self.pool.submit(self.step, [group for group in self._groups(self.step) if group.number in wrong])
            again = {rollout.number: rollout for rollout in self.pool.collect(self.step)}
            rollouts[:] = [again.get(rollout.number, rollout) for rollout in rollouts]
        raise R3Error(f"step {self.step}: traces still wrong after {_RESTARTS + 1} attempts: {what}")

    def _plan(self, items: Sequence[ItemRef]) -> Plan:
        """Share samples out, and put them together as the run's balance says; the same for the same samples."""
        options, num_steps = self.options, self.options.policy.num_steps
        plan = share_out(items, options.layout, micro_batch_size=options.micro_batch_size, num_steps=num_steps)
        seed = [options.seed, self.step]
        return balanced(
            plan,
            options.layout,
            options.balance,
            num_steps=num_steps,
            seed=seed,
            placed=self._expert_at,
            max_received=options.max_received,
        )

    def _trained(self) -> PolicyOptions:
        """Return how the policy is trained: with experts where the run's placement says."""
        policy, place = self.options.policy, self.options.placement
        return policy if place is None else replace(policy, trainer=replace(policy.trainer, place=str(place)))

    def _groups(self, step: int) -> Sequence[Group]:
        """Return the prompts of a step, the same whenever it is asked for."""
        options = self.options
        return [
            Group(
                number,
                prompt,
                options.samples_per_prompt,
                options.record / f"{step:06d}-{number:05d}" if options.record else None,
            )
            for number, prompt in enumerate(self._prompts.of_step(step, options.batch_size))
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

    def _for_engines(self, folder: Path, version: int) -> Path:
        """Return where the engines find weights: as the trainer wrote them, or as the run rounds them for engines."""
        if self.options.rollout_weights == "as-trained":
            return folder
        return write_rounded(folder, self.options.folder / "weights" / f"{version}.fp8-rounded")

    def _prune(self) -> None:
        """Keep the newest weights, from which an engine may have to start again, and the newest checkpoints."""
        self.checkpoints.prune(self.options.keep_checkpoints)
        for folder in (self.options.folder / "weights").glob("*"):
            if folder != self._served:
                shutil.rmtree(folder, ignore_errors=True)

    def _event(self, kind: str, what: str) -> None:
        assert self._log is not None
        self._log.event(self.step, kind, what)
