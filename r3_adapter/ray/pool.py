"""The rollout engines of a run: groups are shared out over them, and what an engine loses is rolled out again."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from r3_adapter.errors import R3Error
from r3_adapter.ray.faults import reason
from r3_adapter.ray.rollout import Group, Rollout, RolloutActor
from r3_adapter.sglang.cpu import cpu_environment
from r3_adapter.sglang.settings import EngineSettings

_ATTEMPTS = 4
OnEvent = Callable[[str, str], None]
"""Told the kind of an event and what happened."""


@dataclass(frozen=True)
class _Asked:
    """A group that an engine works on; life: which of the engine's lives was asked."""

    batch: int
    group: Group
    engine: int
    life: int
    attempt: int


class RolloutPool:
    """Engines as actors; each that dies, hangs or refuses weights is started again with the latest weights.

    settings: of each engine; its checkpoint and weight version are the first weights.
    stages: the global MoE layers of each pipeline stage of the trainer.
    timeout: seconds for an engine to start, or to load weights.
    idle_timeout: seconds in which no group gets done, after which the engines that are asked for some count as hanging.

    Raises:
        R3Error: an engine that does not start; from `collect` also a group that failed several times.
    """

    def __init__(
        self,
        settings: EngineSettings,
        num_engines: int,
        task: str,
        sampling_params: Mapping[str, Any],
        stages: Sequence[Sequence[int]],
        *,
        timeout: float,
        idle_timeout: float,
        on_event: OnEvent,
        num_gpus: float = 0,
    ) -> None:
        self._settings, self._task, self._params, self._stages = settings, task, dict(sampling_params), stages
        self._timeout, self._idle_timeout = timeout, idle_timeout
        self._on_event, self._num_gpus = on_event, num_gpus
        self._lives = [0] * num_engines
        self._asked: dict[ray.ObjectRef[Any], _Asked] = {}
        self._done: dict[int, dict[int, Rollout]] = {}
        self.engines: list[Any] = [self._new_engine() for _ in range(num_engines)]
        for number in range(num_engines):
            self._wait_for(number)

    def submit(self, batch: int, groups: Sequence[Group]) -> None:
        """Give groups to the engines; they belong to a batch, whose number `collect` wants."""
        self._done.setdefault(batch, {})
        for group in groups:
            self._done[batch].pop(group.number, None)
            self._ask(batch, group, group.number % len(self.engines), 0)

    def collect(self, batch: int) -> list[Rollout]:
        """Wait for all groups of a batch; return what became of them, in order."""
        idle_since = time.monotonic()
        while waiting := [ref for ref, asked in self._asked.items() if asked.batch == batch]:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=1.0)
            for ref in ready:
                idle_since = time.monotonic()
                self._take(ref)
            if time.monotonic() - idle_since > self._idle_timeout:
                for number in {asked.engine for ref in waiting if (asked := self._asked.get(ref))}:
                    self._restart(number, self._lives[number], f"nothing done in {self._idle_timeout:g} s")
                idle_since = time.monotonic()
        return [rollout for _, rollout in sorted(self._done.pop(batch).items())]

    def update_weights(self, folder: Path, version: str) -> None:
        """Load weights into all engines; one that fails to is started again with them."""
        self._settings = replace(self._settings, model_path=str(folder), weight_version=version)
        lives = list(self._lives)
        wanted = [engine.update_weights.remote(str(folder), version) for engine in self.engines]
        for number, ref in enumerate(wanted):
            try:
                ray.get(ref, timeout=self._timeout)
            except ray.exceptions.RayError as error:
                self._on_event("weights_failed", f"engine {number}, weights {version}: {reason(error)}")
                self._restart(number, lives[number], "its weights could not be updated")

    def close(self) -> None:
        """End all engines."""
        for engine in self.engines:
            ray.kill(engine)

    def _ask(self, batch: int, group: Group, number: int, attempt: int) -> None:
        ref = self.engines[number].generate.remote(group)
        self._asked[ref] = _Asked(batch, group, number, self._lives[number], attempt)

    def _take(self, ref: "ray.ObjectRef[Any]") -> None:
        asked = self._asked.pop(ref, None)
        if asked is None:
            return
        try:
            rollout = ray.get(ref)
            why = rollout.lost
        except ray.exceptions.RayTaskError as error:
            # The request is at fault, not the engine.
            why = reason(error)
        except ray.exceptions.RayError as error:
            why = reason(error)
            self._restart(asked.engine, asked.life, why)
        if not why:
            self._done[asked.batch][asked.group.number] = rollout
            return
        if asked.attempt + 1 >= _ATTEMPTS:
            raise R3Error(f"prompt {asked.group.number} failed {_ATTEMPTS} times, the last time: {why}")
        self._on_event("rollout_lost", f"engine {asked.engine}, prompt {asked.group.number}: {why}")
        self._ask(asked.batch, asked.group, asked.engine, asked.attempt + 1)

    def _restart(self, number: int, life: int, why: str) -> None:
        if life != self._lives[number]:
            return
        self._lives[number] += 1
        self._on_event("engine_restarted", f"engine {number}: {why}")
        ray.kill(self.engines[number])
        self.engines[number] = self._new_engine()
        self._wait_for(number)
        # What the old one worked on fails by itself if it died, but not if it only hung.
        for ref, asked in list(self._asked.items()):
            if asked.engine == number and asked.life == life:
                del self._asked[ref]
                self._ask(asked.batch, asked.group, number, asked.attempt + 1)

    def _wait_for(self, number: int) -> None:
        try:
            ray.get(self.engines[number].ready.remote(), timeout=self._timeout)
        except ray.exceptions.RayError as error:
            raise R3Error(f"engine {number} does not start within {self._timeout:g} s: {reason(error)}") from error

    def _new_engine(self) -> Any:
        options = {"num_cpus": 1, "num_gpus": self._num_gpus, "runtime_env": {"env_vars": cpu_environment()}}
        actor = RolloutActor.options(**options)  # type: ignore[attr-defined]
        return actor.remote(self._settings.to_json(), self._task, self._params, self._stages)
