"""Trackers: each gets each figure once, by the field's names; one that fails is left out, and the run goes on."""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from r3_adapter.errors import R3Error
from r3_adapter.runs.log import Run, RunLog
from r3_adapter.runs.trackers import named, trackers_of

FIELD = ("rollout/", "train/", "perf/", "eval/", "r3/")
TOLD = []


@contextmanager
def kept(folder, config, resume_at):
    TOLD.append((folder.name, config["name"], resume_at))
    yield lambda step, metrics: TOLD.append((step, metrics))
    TOLD.append("end")


@contextmanager
def fails(folder, config, resume_at):
    def track(step, metrics):
        if step == 1:
            raise ConnectionError("no route to host")
        TOLD.append(step)

    yield track
    raise ValueError("twice")


def test_each_figure_has_one_name_of_the_field(synthetic):
    step = {**Run.load(synthetic / "r3-seed1").steps[0], "lr": 1e-4, "eval_reward": 0.5}
    step["throughput"] = {"tokens_per_gpu_per_sec": 3.0, "mfu": 0.4}
    found = named(step)
    count = sum(len(value) if isinstance(value, dict) else 1 for key, value in step.items())
    # Less the step's own number, its time and its weights' name; more by the mean length.
    assert len(found) == count - 3 + 1
    assert all(name.startswith(FIELD) for name in found), found
    assert found["rollout/raw_reward"] == step["reward"] and found["perf/mfu"] == 0.4
    assert found["perf/actor_train_time"] == step["seconds"]["train"] and found["eval/reward"] == 0.5
    assert found["rollout/response_len/mean"] == step["response_tokens"] / step["samples"]


def test_trackers_are_told_each_step_and_the_one_that_fails_is_an_event(tmp_path, config):
    TOLD.clear()
    with RunLog(tmp_path, config, trackers={"good": kept, "bad": fails}) as log:
        for step in range(3):
            log.step(step, {"reward": float(step)})
    first, *rest, end = TOLD
    assert first == (tmp_path.name, config["name"], None) and end == "end"
    assert rest == [(0, {"rollout/raw_reward": 0.0}), 0, *[(at, {"rollout/raw_reward": float(at)}) for at in (1, 2)]]
    run = Run.load(tmp_path)
    assert run.finished and len(run.steps) == 3
    assert [(event["step"], event["kind"]) for event in run.events] == [(1, "tracker_failed"), (2, "tracker_failed")]
    assert run.events[0]["what"] == "bad: ConnectionError: no route to host; it gets no more steps"


def test_a_tracker_that_does_not_begin_does_not_stop_a_run(tmp_path, config):
    def no(folder, config, resume_at):
        raise OSError("no network")

    with RunLog(tmp_path, config, trackers={"no": no}) as log:
        log.step(0, {"reward": 1.0})
    assert [event["what"] for event in Run.load(tmp_path).events] == ["no: OSError: no network; it gets no more steps"]


def test_a_tracker_that_is_not_there_is_refused_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_trackers", sys.modules[__name__])
    assert trackers_of(("own_trackers:kept",))["own_trackers:kept"] is kept
    for name in ("own_trackers:none", "no.such:thing", "own_trackers", "own_trackers:TOLD"):
        with pytest.raises(R3Error, match=f"tracker '{name}' is "):
            trackers_of((name,))


@pytest.mark.parametrize(
    ("service", "file"), [("wandb", "wandb/offline-run-*/*.wandb"), ("swanlab", "swanlog/run-*/*.swanlab")]
)
def test_a_service_takes_it_as_the_docs_have_it(tmp_path, config, monkeypatch, service, file):
    pytest.importorskip(service)
    monkeypatch.setenv(f"{service.upper()}_MODE", "offline")
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    code = text.split(f"```python\n# {service}_tracker.py\n")[1].split("```")[0]
    space = {}
    exec(compile(code, f"{service}_tracker.py", "exec"), space)
    with RunLog(tmp_path, config, trackers={service: space["track"]}) as log:
        log.step(0, {"reward": 0.25})
        log.step(1, {"reward": 0.5})
    assert not Run.load(tmp_path).events
    (written,) = tmp_path.glob(file)
    # wandb's own process may write the end of the file after `finish` has returned.
    deadline = time.monotonic() + 60
    while b"rollout/raw_reward" not in written.read_bytes():
        assert time.monotonic() < deadline, f"{written}: no rollout/raw_reward"
        time.sleep(0.1)
