"""The rollout engines of a run: groups are shared out over them, and what an engine loses is rolled out again."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from r3_adapter.errors import R3Error
from r3_adapter.ray.faults import EngineLost, cause_of, reason
from r3_adapter.ray.rollout import Group, Rollout, RolloutActor
from r3_adapter.sglang.cpu import cpu_environment
from r3_adapter.sglang.settings import EngineSettings

_ATTEMPTS = 4
OnEvent = Callable[[str, str], None]
"""Told the kind of an event and what happened."""


@dataclass(frozen=True)
class _Asked:
    """A group that an engine works on, or will; life: which of the engine's lives was asked."""

    batch: int
    group: Group
    engine: int
    life: int
    attempt: int


class RolloutPool:
    """Engines as actors; each that dies, hangs or refuses weights is started again with the latest weights.

    A group fails if it raises, or if its engine dies or hangs while it works on nothing else. Of several that an engine
    worked on nobody knows which one did it: they are asked again in two halves, one after the other, and so on.

    settings: of each engine; its checkpoint and weight version are the first weights.
    stages: the global MoE layers of each pipeline stage of the trainer.
    counted: let references to samples say how many tokens each expert has.
    timeout: seconds for an engine to start, or to load weights.
    idle_timeout: seconds in which an engine that is asked for groups gets none done, after which it counts as hanging.

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
        counted: bool = False,
    ) -> None:
        self._settings, self._task, self._params, self._stages = settings, task, dict(sampling_params), stages
        self._timeout, self._idle_timeout = timeout, idle_timeout
        self._on_event, self._num_gpus, self._counted = on_event, num_gpus, counted
        self._lives = [0] * num_engines
        self._since = [0.0] * num_engines
        self._asked: dict[ray.ObjectRef[Any], _Asked] = {}
        self._later: list[list[list[_Asked]]] = [[] for _ in range(num_engines)]
        self._done: dict[int, dict[int, Rollout]] = {}
        self.engines: list[Any] = [self._new_engine() for _ in range(num_engines)]
        for number in range(num_engines):
            self._wait_for(number)

    def submit(self, batch: int, groups: Sequence[Group]) -> None:
        """Give groups to the engines; they belong to a batch, whose number `collect` wants."""
        self._done.setdefault(batch, {})
        for group in groups:
            self._done[batch].pop(group.number, None)
            number = group.number % len(self.engines)
            asked = _Asked(batch, group, number, self._lives[number], 0)
            if self._later[number]:
                self._later[number][-1].append(asked)
            else:
                self._ask(asked)

    def collect(self, batch: int) -> list[Rollout]:
        """Wait for all groups of a batch; return what became of them, in order."""
        self._since = [time.monotonic()] * len(self.engines)
        while self._owes(batch):
            ready, _ = ray.wait(list(self._asked), num_returns=1, timeout=1.0)
            for ref in ready:
                self._take(ref)
            for number in {asked.engine for asked in self._asked.values()}:
                if time.monotonic() - self._since[number] > self._idle_timeout:
                    self._restart(number, self._lives[number], f"nothing done in {self._idle_timeout:g} s")
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
                self._restart(number, lives[number], "its weights could not be updated", blame=False)

    def close(self) -> None:
        """End all engines."""
        for engine in self.engines:
            ray.kill(engine)

    def _owes(self, batch: int) -> bool:
        later = (asked for parts in self._later for part in parts for asked in part)
        return any(asked.batch == batch for each in (self._asked.values(), later) for asked in each)

    def _ask(self, asked: _Asked) -> None:
        ref = self.engines[asked.engine].generate.remote(asked.group)
        self._asked[ref] = replace(asked, life=self._lives[asked.engine])
        self._since[asked.engine] = time.monotonic()

    def _take(self, ref: "ray.ObjectRef[Any]") -> None:
        """Take what an engine says; where it is lost, ask again."""
        asked = self._asked.pop(ref)
        self._since[asked.engine] = time.monotonic()
        try:
            rollout = ray.get(ref)
            why = rollout.lost
        except ray.exceptions.RayError as error:
            why = reason(error)
            if _is_engines(error):
                self._asked[ref] = asked
                self._restart(asked.engine, asked.life, why)
                return
        if not why:
            self._done[asked.batch][asked.group.number] = rollout
        else:
            again = self._failed(asked, why)
            at = f"engine {asked.engine}, prompt {asked.group.number}"
            self._on_event("rollout_lost", f"{at}: {why}; it is asked again")
            self._ask(again)
        self._go_on(asked.engine)

    def _failed(self, asked: _Asked, why: str) -> _Asked:
        """Return what to ask for when a group has failed once more."""
        if asked.attempt + 1 >= _ATTEMPTS:
            raise R3Error(f"prompt {asked.group.number} failed {_ATTEMPTS} times, the last time: {why}")
        return replace(asked, attempt=asked.attempt + 1)

    def _restart(self, number: int, life: int, why: str, *, blame: bool = True) -> None:
        """Start an engine again, and ask it for what it had not done; blame: whether a group may have caused it."""
        if life != self._lives[number]:
            return
        self._lives[number] += 1
        lost = self._not_done(number)
        again = [lost]
        if blame and len(lost) == 1:
            again = [[self._failed(lost[0], f"engine {number}: {why}")]]
        elif blame:
            again = [lost[: len(lost) // 2], lost[len(lost) // 2 :]]
        again = [part for part in again if part]
        parts = ", one half after the other" if len(again) > 1 else ""
        said = f"; prompts asked again: {len(lost)}{parts}" if lost else ""
        version = self._settings.weight_version
        self._on_event("engine_restarted", f"engine {number}: {why}; it starts again with weights {version}{said}")
        ray.kill(self.engines[number])
        self.engines[number] = self._new_engine()
        self._wait_for(number)
        self._later[number][:0] = again
        self._go_on(number)

    def _not_done(self, number: int) -> list[_Asked]:
        """Return what an engine that is given up has not done; what it has done, but nobody has taken, is taken."""
        lost = []
        for ref in [ref for ref, asked in self._asked.items() if asked.engine == number]:
            asked = self._asked.pop(ref)
            ready, _ = ray.wait([ref], num_returns=1, timeout=0)
            try:
                rollout = ray.get(ref) if ready else None
            except ray.exceptions.RayError:
                rollout = None
            if rollout is None or rollout.lost:
                lost.append(asked)
            else:
                self._done[asked.batch][asked.group.number] = rollout
        return lost

    def _go_on(self, number: int) -> None:
        """Ask an engine that works on nothing for the next part of what it is to do later."""
        if self._later[number] and not any(asked.engine == number for asked in self._asked.values()):
            for asked in self._later[number].pop(0):
                self._ask(asked)

    def _wait_for(self, number: int) -> None:
        try:
            ray.get(self.engines[number].ready.remote(), timeout=self._timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise R3Error(f"engine {number} has not started in {self._timeout:g} s") from error
        except ray.exceptions.RayError as error:
            raise R3Error(f"engine {number} does not start: {reason(error)}") from error

    def _new_engine(self) -> Any:
        options = {"num_cpus": 1, "num_gpus": self._num_gpus, "runtime_env": {"env_vars": cpu_environment()}}
        actor = RolloutActor.options(**options)  # type: ignore[attr-defined]
        return actor.remote(self._settings.to_json(), self._task, self._params, self._stages, self._counted)


def _is_engines(error: Exception) -> bool:
    """Say whether the engine is gone, and not only a request of it."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return isinstance(cause_of(error), EngineLost)
    return True
