"""The folder of a run: written while it runs, read back by tools that trust none of it.

    RUN/config.json     name, flags, model, layout, seed, versions
    RUN/metrics.jsonl   one object a step: numbers, and objects of numbers (agreement, rows, seconds, bytes, memory)
    RUN/events.jsonl    one object a fault or other event: step, time, kind, what
    RUN/samples.jsonl   texts of a few samples of each step, see samples.py
    RUN/summary.json    what `summarize` returns; there once the run has ended well
    RUN/tensorboard/    the numbers of metrics.jsonl by the names of `trackers.named`

A key may be missing in a step. A number may be NaN or infinite, which Python's json reads and writes; others may not.
"""

import fcntl
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any

from r3_adapter.errors import R3Error, counted
from r3_adapter.runs.disk import writing
from r3_adapter.runs.files import (
    Number,
    Step,
    check_config,
    check_event,
    check_step,
    dump,
    read_config,
    read_lines,
    write_json,
)
from r3_adapter.runs.redact import redacted
from r3_adapter.runs.samples import check_samples
from r3_adapter.runs.trackers import Tracker, Trackers, scalars, trackers_of

R3_STAGES = ("capture", "transport", "repack", "replay")
STAGES = ("rollout", "old_logprobs", "train", "weights", *R3_STAGES)
ROWS = ("replayed", "live", "padding", "stale")

_TRIES = 5
"""To lock a run: one who only looks whether it is under way has it for a moment."""


class RunLog:
    """Writes a run's folder, as a context manager; summary.json comes when it ends without an exception.

    A step is in metrics.jsonl when `step` returns, and trackers have been told of it; one that fails is an event.

    Args:
        folder: RUN; made if it is not there.
        config: what config.json is to hold; what has a secret's name is hidden.
        resume_at: the first step that will be run again or anew; steps from there on are dropped, events are kept.
            None: a new run.
        trackers: by name; None for TensorBoard alone, where it is installed.
        on_event: told the step, kind and text of each event, once it is in the log.

    Raises:
        R3Error: a run is there already and resume_at is None, another process writes to it, or a value has the wrong
            type.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        resume_at: int | None = None,
        trackers: Mapping[str, Tracker] | None = None,
        on_event: Callable[[int, str, str], None] = lambda *_: None,
    ) -> None:
        check_config(config, "config")
        config = redacted(config)
        self.folder, self._last, self._on_event = folder, -1, on_event
        folder.mkdir(parents=True, exist_ok=True)
        # Without buffers: what a full disk has not taken must not be written again when the file is closed.
        self._metrics = (folder / "metrics.jsonl").open("ab", buffering=0)
        try:
            _lock(self._metrics, folder)
            resumed = self._resume(config, resume_at)
            self._events = (folder / "events.jsonl").open("ab", buffering=0)
            self._samples = (folder / "samples.jsonl").open("ab", buffering=0)
        except BaseException:
            self._metrics.close()
            raise
        (folder / "summary.json").unlink(missing_ok=True)
        write_json(folder / "config.json", config)
        if resume_at is not None:
            self.event(resume_at, "resumed", resumed)
        trackers = trackers_of(()) if trackers is None else trackers
        self._trackers = Trackers(trackers, folder, config, resume_at, self._tracker_failed)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._trackers.close()
        self._events.close()
        self._samples.close()
        try:
            if kind is None:
                write_json(self.folder / "summary.json", Run.load(self.folder).summary)
        finally:
            # Last: a run that nobody writes and that has no summary has been stopped.
            self._metrics.close()

    def step(self, number: int, metrics: Step) -> None:
        """Append a step; `step` and `time` are filled in.

        Raises:
            R3Error: not after the last step, or a value that is no number.
        """
        record = {"step": number, "time": time.time(), **metrics}
        place = f"{self.folder / 'metrics.jsonl'}, step {number}"
        check_step(record, place)
        if record["step"] != number or number <= self._last:
            raise R3Error(f"{place}: step ({record['step']}) is not after step ({self._last})")
        _append(self._metrics, record, place)
        self._last = number
        self._trackers.step(number, record)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append texts of a few samples of a step, as `shown_sample` returns them.

        Raises:
            R3Error: too many, or others.
        """
        record = {"step": step, "samples": list(samples)}
        place = f"{self.folder / 'samples.jsonl'}, step {step}"
        check_samples(record, place)
        _append(self._samples, record, place)

    def event(self, step: int, kind: str, what: str) -> None:
        """Append a fault or another event of a step.

        Raises:
            R3Error: a value of the wrong type.
        """
        record = {"step": step, "time": time.time(), "kind": kind, "what": what}
        place = f"{self.folder / 'events.jsonl'}, step {step}"
        check_event(record, place)
        _append(self._events, record, place)
        self._on_event(step, kind, what)

    def _tracker_failed(self, what: str) -> None:
        self.event(max(0, self._last), "tracker_failed", what)

    def _resume(self, config: Mapping[str, Any], resume_at: int | None) -> str:
        """Cut the files behind what is kept; return what the event `resumed` says."""
        path, events = self.folder / "metrics.jsonl", self.folder / "events.jsonl"
        lines = read_lines(path, check_step).lines
        if resume_at is None and (lines or (self.folder / "config.json").exists()):
            raise R3Error(f"{self.folder}: holds a run of {len(lines)} steps; resume it or take another folder")
        before = config if resume_at is None else read_config(self.folder / "config.json")
        kept = [line for line in lines if resume_at is None or line.value["step"] < resume_at]
        self._last = kept[-1].value["step"] if kept else -1
        os.truncate(path, kept[-1].end if kept else 0)
        if events.exists():
            os.truncate(events, max((line.end for line in read_lines(events, check_event).lines), default=0))
        if (samples := self.folder / "samples.jsonl").exists():
            ends = [line.end for line in read_lines(samples, check_samples).lines if line.value["step"] <= self._last]
            os.truncate(samples, max(ends, default=0))
        dropped = len(lines) - len(kept)
        said = [f"{counted(dropped, 'step')} dropped"]
        if resume_at is not None and self._last + 1 < resume_at:
            said.append(f"steps {self._last + 1} to {resume_at - 1} are not in the log")
        said += [f"{key} changed" for key in config if key != "flags" and before.get(key) != config[key]]
        old, new = before["flags"], config["flags"]
        said += [
            f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)
        ]
        return "; ".join(said)


@dataclass(frozen=True)
class Run:
    """A run's folder as it was read.

    steps, events: in order. finished: it ended well; under_way: a process of this host writes it.
    half: files whose last line was not whole, and was left out.
    """

    folder: Path
    config: Mapping[str, Any]
    steps: Sequence[Step]
    events: Sequence[Mapping[str, Any]]
    finished: bool
    under_way: bool
    half: Sequence[str]

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Read a run, which may still be under way: half a line at the end of a file is left out.

        Raises:
            R3Error: no run, or malformed content; it names file and line.
        """
        config = redacted(read_config(folder / "config.json"))
        # Asked before the summary is looked for, which comes before a run lets go of its files.
        under_way = _is_written(folder)
        metrics = read_lines(folder / "metrics.jsonl", check_step)
        events = read_lines(folder / "events.jsonl", check_event)
        for before, after in pairwise(metrics.lines):
            if after.value["step"] <= before.value["step"]:
                raise R3Error(f"{after.place}: step ({after.value['step']}) is not after step ({before.value['step']})")
        half = [name for name, file in (("metrics.jsonl", metrics), ("events.jsonl", events)) if file.half]
        steps, found = ([line.value for line in file.lines] for file in (metrics, events))
        return cls(folder, config, steps, found, (folder / "summary.json").is_file(), under_way, half)

    @property
    def name(self) -> str:
        """What reports call the run."""
        return str(self.config["name"])

    def series(self, of: Callable[[Step], Number | None]) -> dict[int, float]:
        """Return a figure of each step that has it."""
        found = ((step["step"], of(step)) for step in self.steps)
        return {step: float(value) for step, value in found if value is not None}

    @cached_property
    def samples(self) -> list[Mapping[str, Any]]:
        """The lines of samples.jsonl, in order; a run of an older version has none.

        Raises:
            R3Error: malformed content; it names file and line.
        """
        return [line.value for line in read_lines(self.folder / "samples.jsonl", check_samples).lines]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return summarize(self.name, self.steps, self.events)


def summarize(name: str, steps: Sequence[Step], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a run's figures; what no step has is left out.

    reward_first, reward_last: means over the first and the last tenth of the steps, at least one.
    k3, f_2: means over the steps.
    r3_share, r3_stages: seconds of R3's stages, summed over steps that replayed, over the sum of all steps' seconds.
    seconds: that sum.
    collapsed: a number of some step is not finite; or, with 10 steps or more, the mean reward of the last tenth is
        less than half of the best mean over as many steps in a row. Where that best is not positive, half of it says
        nothing and only the first counts.
    """
    rewards = [step["reward"] for step in steps if "reward" in step]
    tenth = max(1, len(rewards) // 10)
    timed = [step["seconds"] for step in steps if "step" in step.get("seconds", {})]
    total = sum(seconds["step"] for seconds in timed)
    charged = [step["seconds"] for step in steps if "step" in step.get("seconds", {}) and replays(step)]
    stages = {
        stage: sum(seconds.get(stage, 0.0) for seconds in charged) / total
        for stage in R3_STAGES
        if total and any(stage in seconds for seconds in charged)
    }
    figures = {
        "reward_first": mean(rewards[:tenth]),
        "reward_last": mean(rewards[-tenth:]),
        "k3": mean([step["k3"] for step in steps if "k3" in step]),
        "f_2": mean([step["f_2"] for step in steps if "f_2" in step]),
        "r3_share": sum(stages.values()) if stages else None,
        "seconds": total if timed else None,
    }
    return {
        "name": name,
        "steps": len(steps),
        **{key: value for key, value in figures.items() if value is not None},
        "collapsed": _collapsed(steps, rewards, tenth),
        "r3_stages": stages,
        "events": dict(Counter(event["kind"] for event in events)),
    }


def replays(step: Step) -> bool:
    """Say whether a step replayed routes: one that only looked at them is not charged with R3's stages."""
    return bool(step.get("rows", {}).get("replayed", True))


def _collapsed(steps: Sequence[Step], rewards: Sequence[Number], tenth: int) -> bool:
    if not all(math.isfinite(value) for step in steps for _, value in scalars(step)):
        return True
    if len(rewards) < 10:
        return False
    sums = list(accumulate(rewards, initial=0.0))
    windows = [(end - begin) / tenth for begin, end in zip(sums, sums[tenth:], strict=False)]
    return max(windows) > 0 and windows[-1] < max(windows) / 2


def mean(values: Sequence[Number]) -> float | None:
    """Return the mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def check_free(folder: Path) -> None:
    """Refuse a run that another process writes.

    Raises:
        R3Error: it does.
    """
    if (path := folder / "metrics.jsonl").exists():
        with path.open("ab") as file:
            _lock(file, folder)


def _lock(file: IO[bytes], folder: Path) -> None:
    for _ in range(_TRIES):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
    raise R3Error(f"{folder}: another process writes this run")


def _is_written(folder: Path) -> bool:
    """Say whether a process of this host writes a run."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # No file, or none that can be locked.
        return False
    return False


def _append(file: IO[bytes], record: Mapping[str, Any], place: str) -> None:
    with writing(Path(file.name)):
        left = dump(record, place) + b"\n"
        while left:
            left = left[file.write(left) :]
