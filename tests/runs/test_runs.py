"""A run's folder: what is written comes back, is cut where a run goes on, and is refused where it is malformed."""

import json
import math
from pathlib import Path

import pytest

from r3_adapter.errors import R3Error
from r3_adapter.report import last_line
from r3_adapter.runs.log import Run, RunLog, summarize
from r3_adapter.runs.page import page
from r3_adapter.runs.samples import shown_sample

HOSTILE_LINES = {
    b"{": "no JSON",
    b"[1]": "not an object",
    b"{}": "step is None",
    b'{"step": -1}': "step is -1",
    b'{"step": true}': "step is True",
    b'{"step": 1.5}': "step is 1.5",
    b'{"step": 1e999}': "step is inf",
    b'{"step": 0, "step": 1}': "a key twice",
    b'{"step": 0, "reward": "high"}': "reward is 'high', not a number",
    b'{"step": 0, "reward": null}': "reward is None",
    b'{"step": 0, "reward": {"a": 1}}': "not a number",
    b'{"step": 0, "rows": 4}': "rows is 4, not an object",
    b'{"step": 0, "rows": {"live": -4}}': "rows/live is -4",
    b'{"step": 0, "seconds": {"step": NaN}}': "seconds/step is nan",
    b'{"step": 0, "agreement": {"<b>": 1}}': "no layer",
    b'{"step": 0, "weight_version": 3}': "weight_version is 3",
    b'{"step": 0, "reward": 1' + b"0" * 400 + b"}": "0000, not a number of 64 bits",
    b'{"step": 0, "reward": 1' + b"0" * 5000 + b"}": "no JSON",
    b"[" * 100_000 + b"]" * 100_000: "no JSON",
    b'{"step": 0, "x": "\xff"}': "no JSON",
    b'{"step": 0}\x00': "no JSON",
    b"": "no JSON",
}


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, config, steps):
    with RunLog(folder, config) as log:
        for step, reward in steps:
            log.step(step, {"reward": reward})


def test_what_is_written_comes_back(tmp_path, config):
    metrics = {
        "reward": 0.5,
        "weight_version": "3",
        "rows": {"replayed": 4, "stale": 0},
        "agreement": {"0": 0.9, "11": 1.0},
        "loss": math.inf,
    }
    with RunLog(tmp_path / "run", config) as log:
        log.step(0, metrics)
        assert len(steps_of(tmp_path / "run")) == 1  # on disk while it runs
        assert not Run.load(tmp_path / "run").finished
        log.event(0, "trace_lost", "sample 3")
    run = Run.load(tmp_path / "run")
    assert run.finished and run.config == config and not run.half
    assert {key: run.steps[0][key] for key in metrics} == metrics
    assert run.steps[0]["step"] == 0 and run.steps[0]["time"] > 1e9
    assert [(event["step"], event["kind"], event["what"]) for event in run.events] == [(0, "trace_lost", "sample 3")]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == run.summary


def test_tensorboard_has_each_number(tmp_path, config):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, config) as log:
        log.step(0, {"reward": 0.25, "rows": {"live": 4}, "weight_version": "0"})
        log.step(1, {"reward": 0.5})
    with RunLog(tmp_path, config, resume_at=1) as log:
        log.step(1, {"reward": 0.75})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"rollout/raw_reward", "r3/rows/live"}
    assert [(found.step, found.value) for found in events.Scalars("rollout/raw_reward")] == [(0, 0.25), (1, 0.75)]
    (text,) = {each.tensor_proto.string_val[0] for each in events.Tensors("config/text_summary")}
    assert config["name"].encode() in text


def test_a_run_that_dies_has_no_summary(tmp_path, config):
    with pytest.raises(RuntimeError), RunLog(tmp_path, config) as log:
        log.step(0, {"reward": 1.0})
        raise RuntimeError
    assert not (tmp_path / "summary.json").exists()
    assert not Run.load(tmp_path).finished


@pytest.mark.parametrize(("resume_at", "kept"), [(0, []), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (8, [0, 1, 2, 3, 4])])
def test_resuming_drops_what_will_run_again(tmp_path, config, resume_at, kept):
    write(tmp_path, config, [(step, float(step)) for step in range(5)])
    changed = {**config, "flags": {"lr": 2e-4}}
    with RunLog(tmp_path, changed, resume_at=resume_at) as log:
        assert not (tmp_path / "summary.json").exists()
        log.step(resume_at, {"reward": 100.0})
    run = Run.load(tmp_path)
    assert [step["step"] for step in run.steps] == [*kept, resume_at]
    assert run.steps[-1]["reward"] == 100.0
    (event,) = run.events
    assert event["kind"] == "resumed" and event["what"].startswith(f"{5 - len(kept)} step")
    assert "lr 0.0001 -> 0.0002" in event["what"]
    assert ("steps 5 to 7 are not in the log" in event["what"]) == (resume_at == 8)
    assert run.finished and run.config == changed


def test_texts_of_steps_that_will_run_again_are_dropped(tmp_path, config):
    def log_steps(first, last, **resumed):
        with RunLog(tmp_path, config, trackers={}, **resumed) as log:
            for step in range(first, last):
                log.samples(step, [shown_sample("1+1=", str(last), 0.5)])
                log.step(step, {"reward": 0.5})
            log.samples(last, [shown_sample("1+1=", "of a step that was not done", 0.5)])

    log_steps(0, 4)
    log_steps(2, 5, resume_at=2)
    said = [(line["step"], line["samples"][0]["response"]) for line in Run.load(tmp_path).samples]
    assert said == [(0, "4"), (1, "4"), (2, "5"), (3, "5"), (4, "5"), (5, "of a step that was not done")]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"step": 0, "samples": [{"prompt": 1, "response": "", "reward": 0.0}]}', "not a string"),
        ('{"step": 0, "samples": [{"prompt": "", "response": "", "reward": "<b>"}]}', "not a fraction"),
        ('{"step": 0, "samples": [{"prompt": ""}]}', "not an object of prompt, response, reward"),
        ('{"step": 0, "samples": [0, 0, 0, 0, 0]}', "not a list of at most 4"),
        ('{"samples": []}', "step is None"),
    ],
)
def test_texts_of_another_form_are_refused_with_their_line(tmp_path, config, line, wrong):
    with RunLog(tmp_path, config, trackers={}) as log:
        log.step(0, {"reward": 0.5})
        log.samples(0, [])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(R3Error, match=f"samples.jsonl, line 2: .*{wrong}"):
        _ = Run.load(tmp_path).samples


def test_resuming_behind_half_lines(tmp_path, config):
    with RunLog(tmp_path, config) as log:
        log.step(0, {"reward": 1.0})
        log.event(0, "trace_lost", "x")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 1, "rew')
    run = Run.load(tmp_path)
    assert list(run.half) == ["metrics.jsonl", "events.jsonl"]
    assert len(run.steps) == len(run.events) == 1
    with RunLog(tmp_path, config, resume_at=1) as log:
        log.step(1, {"reward": 2.0})
    run = Run.load(tmp_path)
    assert [step["reward"] for step in run.steps] == [1.0, 2.0] and not run.half
    assert [event["kind"] for event in run.events] == ["trace_lost", "resumed"]


def test_a_folder_has_one_run_and_one_writer(tmp_path, config):
    write(tmp_path, config, [(0, 1.0)])
    with pytest.raises(R3Error, match="holds a run of 1 steps"):
        RunLog(tmp_path, config)
    with RunLog(tmp_path, config, resume_at=1), pytest.raises(R3Error, match="another process writes"):
        RunLog(tmp_path, config, resume_at=1)
    with pytest.raises(R3Error, match="no such file"):
        RunLog(tmp_path / "new", config, resume_at=1)


@pytest.mark.parametrize(
    ("number", "metrics", "reason"),
    [
        (1, {}, r"step \(1\) is not after step \(1\)"),
        (2, {"step": 3}, r"step \(3\) is not after step \(1\)"),
        (2, {"reward": None}, "reward is None"),
        (2, {"reward": "1"}, "reward is '1'"),
        (2, {"rows": {"live": math.nan}}, "rows/live is nan"),
        (2, {"memory": [1]}, r"memory is \[1\]"),
    ],
)
def test_the_writer_refuses_what_the_reader_would(tmp_path, config, number, metrics, reason):
    with RunLog(tmp_path, config) as log:
        log.step(1, {"reward": 1.0})
        with pytest.raises(R3Error, match=reason):
            log.step(number, metrics)
    assert [step["step"] for step in Run.load(tmp_path).steps] == [1]


@pytest.mark.parametrize("line", HOSTILE_LINES, ids=range(len(HOSTILE_LINES)))
def test_a_hostile_line_is_named(tmp_path, config, line):
    write(tmp_path, config, [])
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 9}\n')
    with pytest.raises(R3Error, match=r"metrics\.jsonl, line 2") as caught:
        Run.load(tmp_path)
    assert HOSTILE_LINES[line] in str(caught.value)
    assert len(str(caught.value)) < 600


def test_steps_in_wrong_order_are_named(tmp_path, config):
    write(tmp_path, config, [])
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 4}\n{"step": 4}\n')
    with pytest.raises(R3Error, match=r"line 2: step \(4\) is not after step \(4\)"):
        Run.load(tmp_path)


@pytest.mark.parametrize("change", [{"kind": 3}, {"what": None}, {"step": "0"}, {"time": math.nan}])
def test_a_hostile_event_is_named(tmp_path, config, change):
    write(tmp_path, config, [])
    event = {"step": 0, "time": 1.0, "kind": "a", "what": "b", **change}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    with pytest.raises(R3Error, match=rf"events\.jsonl, line 1: {next(iter(change))} is"):
        Run.load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"name": "a\nb"}, {"name": "\x1b[2J"}, {"name": ""}, {"name": 3}, {"seed": True}, {"flags": []}]
)
def test_a_hostile_config_is_named(tmp_path, config, change):
    write(tmp_path, config, [])
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(R3Error, match=rf"config\.json: {next(iter(change))} is"):
        Run.load(tmp_path)


def test_what_is_no_file_is_refused(tmp_path, config):
    write(tmp_path, config, [])
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(R3Error, match=r"metrics\.jsonl"):
        Run.load(tmp_path)


def test_summary_is_what_the_steps_say():
    steps = [
        {"step": 0, "reward": 0.25, "k3": 1.0, "seconds": {"step": 2.0, "capture": 0.5, "replay": 0.25, "train": 1.0}},
        {"step": 1, "reward": 0.75, "seconds": {"step": 6.0, "capture": 0.5}},
        {"step": 2, "k3": 3.0, "f_2": 0.5, "seconds": {"capture": 100.0}},  # no total: counts for no share
    ]
    events = [{"kind": "trace_lost"}, {"kind": "resumed"}, {"kind": "trace_lost"}]
    assert summarize("x", steps, events) == {
        "name": "x",
        "steps": 3,
        "reward_first": 0.25,
        "reward_last": 0.75,
        "k3": 2.0,
        "f_2": 0.5,
        "r3_share": 1.25 / 8,
        "seconds": 8.0,
        "collapsed": False,
        "r3_stages": {"capture": 1.0 / 8, "replay": 0.25 / 8},
        "events": {"trace_lost": 2, "resumed": 1},
    }


def test_a_run_that_replays_nothing_is_not_charged_with_r3():
    seconds = {"step": 2.0, "capture": 0.5, "transport": 0.25, "repack": 0.25}
    live = [{"step": 0, "rows": {"replayed": 0, "live": 90}, "seconds": seconds}]
    summary = summarize("x", live, [])
    assert "r3_share" not in summary and summary["r3_stages"] == {} and summary["seconds"] == 2.0
    assert "R3" not in last_line(summary, Path("page"))
    replayed = [{"step": 1, "rows": {"replayed": 90, "live": 0}, "seconds": seconds}]
    assert summarize("x", live + replayed, [])["r3_share"] == 0.25


def test_secrets_are_neither_written_nor_shown(tmp_path, config):
    flags = {"sglang_args": {"api_key": "s3cr3t", "ssl_keyfile_password": "s3cr3t", "inner": [{"hf_token": "s3cr3t"}]}}
    flags |= {"proxy": "http://me:s3cr3t@host/x", "max_total_tokens": 64, "admin_api_key": None}
    with RunLog(tmp_path / "run", {**config, "flags": flags}):
        pass
    written = (tmp_path / "run" / "config.json").read_text()
    assert "s3cr3t" not in written and written.count("(hidden)") == 4 and '"max_total_tokens": 64' in written
    with RunLog(tmp_path / "run", {**config, "flags": {**flags, "admin_api_key": "s3cr3t"}}, resume_at=0):
        pass
    assert "s3cr3t" not in (tmp_path / "run" / "events.jsonl").read_text()
    # A folder of an older version.
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "flags": flags}))
    assert "s3cr3t" not in page([Run.load(tmp_path / "run")])


def test_summary_of_nothing_has_no_figures():
    assert summarize("x", [], []) == {"name": "x", "steps": 0, "collapsed": False, "r3_stages": {}, "events": {}}


@pytest.mark.parametrize(
    ("rewards", "collapsed"),
    [
        ([0.1] * 20, False),
        ([0.8] * 18 + [0.5] * 2, False),
        ([0.8] * 18 + [0.3] * 2, True),
        ([0.1] * 9 + [0.9] + [0.1] * 10 + [0.4] * 2, False),  # one good step is no good running mean
        ([0.9, 0.1, 0.1], False),  # too few to judge
        ([-0.1] * 10 + [-9.0] * 10, False),  # half of a negative best says nothing
        ([0.5] * 5 + [math.nan] + [0.5] * 5, True),
    ],
)
def test_collapse(rewards, collapsed):
    steps = [{"step": step, "reward": reward} for step, reward in enumerate(rewards)]
    assert summarize("x", steps, [])["collapsed"] is collapsed


def test_any_number_that_is_not_finite_is_a_collapse():
    assert summarize("x", [{"step": 0, "grad_norm": math.inf}], [])["collapsed"]
