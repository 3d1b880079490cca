"""What the loop says on stderr while it runs: a line for each part of set-up, each step, each fault, and the end.

Read alone, these lines are the whole story of a run. Steps count from 1 here, as people count; the files of a run, its
page and its trackers count from 0.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from r3_adapter.errors import R3Error, counted
from r3_adapter.ray.loop import Loop
from r3_adapter.report import Show, run_progress
from r3_adapter.runs.log import Run
from r3_adapter.signals import say


@contextmanager
def told(loop: Loop, name: str) -> Iterator[None]:
    """Let a loop that runs inside say what it does; name: of the command, before each line.

    Raises:
        R3Error: what the loop ends with, and what of the run is kept.
    """
    with run_progress(name, loop.options.num_rollouts, loop.first) as show:
        console, observe_too, on_event_too = _Console(loop, name, show), loop.observe, loop.on_event

        def observe(loop: Loop, step: int, stage: str) -> None:
            console.observe(loop, step, stage)
            observe_too(loop, step, stage)

        def on_event(step: int, kind: str, what: str) -> None:
            console.event(step, kind, what)
            on_event_too(step, kind, what)

        loop.observe, loop.on_event = observe, on_event
        try:
            yield
        except R3Error as error:
            raise R3Error(f"{error}; {stopped(loop)}") from error


@contextmanager
def timed(name: str, what: str) -> Iterator[None]:
    """Say what was done inside, and in how many seconds; nothing where it fails."""
    start = time.monotonic()
    yield
    say(f"{name}: {what} ({time.monotonic() - start:.1f} s)")


def begins(loop: Loop) -> str:
    """Say what a run is, and where one that was begun goes on; what it does again is named."""
    options, first = loop.options, loop.first
    engines = counted(options.num_engines, "engine")
    sizes = {name: getattr(options.layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    ranks = f"{counted(options.layout.world_size, 'rank')} of the trainer{f' ({layout})' if layout else ''}"
    what = {"off": "routes are not replayed", "r2": "the trainer's own routes are replayed (R2)"}
    replay = what.get(options.policy.replay, "routes are replayed (R3)")
    said = f"{options.folder}: {options.num_rollouts} steps; {engines}, {ranks}; {replay}"
    if not loop.begun:
        return said
    last = next(reversed(Run.load(options.folder).steps), None)
    logged = last["step"] + 1 if last else 0
    goes_on = f"goes on after step {first} ({loop.checkpoints.path(first)})" if first else "begins anew: no checkpoint"
    lost = f"; to be made again, since no checkpoint has them: {_steps(first, logged)}"
    return f"{said}; {goes_on}{lost if logged > first else ''}"


def stopped(loop: Loop) -> str:
    """Say at which step a run was stopped, and what of it is kept."""
    at = f"it was in step {min(loop.step + 1, loop.options.num_rollouts)} of {loop.options.num_rollouts}"
    if not (steps := loop.checkpoints.steps()):
        return f"{at}; no checkpoint is there yet: the same command begins anew"
    last = steps[-1]
    again = f", with {_steps(last, loop.step)} again" if loop.step > last else ""
    return f"{at}; {loop.checkpoints.path(last)} is there: the same command goes on after step {last}{again}"


def _after(step: int) -> str:
    return f"step {step}" if step else "the beginning"


def _steps(done: int, logged: int) -> str:
    """Name the steps behind those that are done."""
    return f"step {logged}" if logged == done + 1 else f"steps {done + 1} to {logged}"


class _Console:
    """Says the stages of a loop that take long, as they are done, each event, and the metrics of each step."""

    def __init__(self, loop: Loop, name: str, show: Show) -> None:
        self._loop, self._name, self._show, self._since = loop, name, show, time.monotonic()

    def observe(self, loop: Loop, step: int, stage: str) -> None:
        """Say what has been done, once the next thing is about to happen."""
        options = loop.options
        if stage == "engines":
            self._done(f"trainer: {counted(options.layout.world_size, 'rank')} with the weights of {_after(step)}")
        elif stage == "ready":
            self._done(f"rollout: {counted(options.num_engines, 'engine')} with the weights of {_after(step)}")
        elif stage == "evaluated":
            found = loop.last_metrics
            self._done(f"evaluation of the first weights: reward {found['eval_reward']:.3g}")
        elif stage == "logged":
            saved = loop.checkpoints.path(step + 1)
            self._show(step + 1, loop.last_metrics, f"checkpoint {saved.name}" if saved.is_dir() else "")
        if stage in ("ranks", "engines", "ready"):
            self._since = time.monotonic()

    def event(self, step: int, kind: str, what: str) -> None:
        """Say what has happened; that a run goes on, and that nothing was lost by it, is said before."""
        what = what.removeprefix("0 steps dropped").removeprefix("; ") if kind == "resumed" else what
        if not what:
            return
        at = f"step {min(step + 1, self._loop.options.num_rollouts)} of {self._loop.options.num_rollouts}"
        say(f"{self._name}: {at}: {kind.replace('_', ' ')}: {what}")

    def _done(self, what: str) -> None:
        say(f"{self._name}: {what} ({time.monotonic() - self._since:.1f} s)")
