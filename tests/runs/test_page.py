"""The report page: each run's numbers are on it, nothing is loaded, and nothing that files say becomes markup."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from r3_adapter.cli import main
from r3_adapter.report import last_line, run_progress
from r3_adapter.runs.log import Run, RunLog
from r3_adapter.runs.page import page
from r3_adapter.runs.plots import LOADS, SECTIONS, line_chart, stage_charts
from r3_adapter.runs.samples import shown_sample
from r3_adapter.runs.variants import at, variants_of
from r3_adapter.runs.verdict import verdicts

MARKUP = '<script>document.body.dataset.owned=1</script><img src=x onerror="document.body.dataset.owned=1">\'&amp;'
REWARD = SECTIONS["Learning"][0]


class Elements(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self._open = tag
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_data(self, data):
        if self._open not in ("script", "style"):
            self.text.append(data)


def runs_in(folder):
    return [Run.load(found) for found in sorted(folder.iterdir())]


def make(folder, name, seed=0, steps=(), events=(), flags=None, end=True):
    config = {"name": name, "flags": flags or {}, "model": "m", "layout": {"tp": 1}, "seed": seed, "versions": {}}
    with RunLog(folder, config, trackers={}) as log:
        for step, metrics in enumerate(steps):
            log.step(step, metrics)
        for event in events:
            log.event(*event)
    if not end:
        (folder / "summary.json").unlink()
    return Run.load(folder)


def charts_on(html):
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', html)[1])


@pytest.fixture(scope="module")
def html(synthetic):
    return page(runs_in(synthetic))


def test_nothing_is_loaded(html):
    found = Elements(html)
    outside = {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert not [attribute for attribute in found.attributes if attribute[1] in outside]
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(found.tags)
    assert "url(" not in html[: html.index("</style>")] and "@import" not in html[: html.index("</style>")]
    policy = next(value for tag, name, value in found.attributes if tag == "meta" and value and "default-src" in value)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    assert len(html) < 2_000_000


def test_each_run_and_its_numbers_are_there(html, synthetic):
    text = " ".join(Elements(html).text)
    for run in runs_in(synthetic):
        assert run.name in text
        assert f"{run.summary['reward_last']:#.3g}" in text
        assert f"{run.steps[0]['rows']['padding'] * len(run.steps):,}" in text
    assert "3 of 3" in text and "engine_restarted 1" in text and "digest 3f09.. != 77ab.." in text
    assert "use_tis" in text and "megatron-core 0.16.1" in text


def test_curves_hold_mean_and_band_of_the_seeds(tmp_path):
    rewards = {1: [0.0, 1.0, math.nan], 2: [1.0, 3.0, 5.0], 3: [2.0, 2.0]}
    runs = [make(tmp_path / str(s), f"r3-seed{s}", s, [{"reward": x} for x in xs]) for s, xs in rewards.items()]
    (variant,) = variants_of(runs)
    assert variant.label == "r3"
    curve = variant.curve(at("reward"), 1)
    assert (curve.steps, curve.mean[:2], curve.low[:2], curve.high[:2]) == (
        [0, 1, 2],
        [1.0, 2.0],
        [0.0, 1.0],
        [2.0, 3.0],
    )
    assert curve.num_runs == [3, 3, 2]
    chart = line_chart(REWARD, [variant], 1)
    (series,) = chart.series
    assert (series.low, series.high, series.y) == ([0.0, 1.0, None], [2.0, 3.0, None], [1.0, 2.0, None])
    assert series.said == ["1 (mean of 3)", "2 (mean of 3)", "nan (mean of 2)"]
    assert list(chart.notes) == ["r3: 1 points are not finite, the first at step 2"]
    wide = variant.curve(at("reward"), 2)
    assert (wide.steps, wide.mean[0]) == ([0, 2], pytest.approx(1.5))


def test_gaps_stay_gaps(tmp_path):
    steps = [{"reward": 1.0}, {}, {}, {"reward": 2.0}, {"reward": 2.5}, {"reward": 3.0}]
    chart = line_chart(REWARD, variants_of([make(tmp_path, "a", steps=steps)]), 1)
    assert (chart.series[0].x, chart.series[0].y) == ([0, 1, 3, 4, 5], [1.0, None, 2.0, 2.5, 3.0])


def test_runs_are_grouped_by_seed_and_by_nothing_else(tmp_path):
    def labels(*runs):
        made = [
            make(tmp_path / f"{len(list(tmp_path.iterdir()))}", name, seed, flags=flags) for name, seed, flags in runs
        ]
        return [(variant.label, len(variant.runs)) for variant in variants_of(made)]

    assert labels(("x-seed1", 1, {}), ("y", 1, {"a": 1}), ("x-seed2", 2, {})) == [("x", 2), ("y", 1)]
    assert labels(("p", 1, {"seed": 1}), ("q", 2, {"seed": 2})) == [("p", 2)]
    assert labels(("p", 1, {"lr": 1}), ("q", 2, {"lr": 2})) == [("p", 1), ("q", 1)]
    (one, _), (two, _) = labels(("x-seed1", 1, {}), ("x-seed1", 1, {}))
    assert one != two and one.startswith("x-seed1 (") and two.startswith("x-seed1 (")


def test_settings_that_differ_between_seeds_are_shown(tmp_path):
    runs = [make(tmp_path / str(s), f"x-seed{s}", s, flags={"lr": s, "same": 7}) for s in (1, 2)]
    html = page(runs)
    table = html[: html.index("Each run")]
    assert re.search(r"<th scope=\"row\">lr</th><td>1, 2</td>", table) and ">same<" not in table


def test_what_files_say_stays_text(tmp_path):
    steps = [{"reward": 1.0, "seconds": {"step": 1.0}, "agreement": {"0": 1.0}}] * 3
    events = [(0, MARKUP, MARKUP + "\ud800")]
    config = {"name": MARKUP, "flags": {MARKUP: MARKUP}, "model": MARKUP, "layout": {MARKUP: MARKUP}}
    with RunLog(tmp_path / "a", {**config, "seed": 0, "versions": {MARKUP: MARKUP}}) as log:
        for step, metrics in enumerate(steps):
            log.step(step, metrics)
        log.event(*events[0])
    make(tmp_path / "b", "plain", steps=steps)
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    found = Elements(html)
    assert found.tags.count("script") == 3 and "img" not in found.tags
    assert not [attribute for attribute in found.attributes if attribute[1].startswith("on")]
    assert MARKUP in "".join(found.text)
    assert "<" not in re.search(r'id="charts">(.*?)</script>', html)[1]  # whatever a chart says, it ends no block
    drawn = json.dumps(charts_on(html))
    assert MARKUP[:30] in drawn  # as it is: the browser's test sees that it is shown as a text


def test_texts_of_samples_are_texts_and_not_long(tmp_path):
    runs = [make(tmp_path / name, name, steps=[{"reward": 1.0}] * 3, end=False) for name in "ab"]
    with RunLog(tmp_path / "a", runs[0].config, resume_at=3, trackers={}) as log:
        for step in range(3, 6):
            log.step(step, {"reward": 1.0})
            log.samples(step, [shown_sample(MARKUP, f"said {step} {'x' * 5000} end", step / 8)])
    html = page([Run.load(tmp_path / name) for name in "ab"])
    found = Elements(html)
    assert MARKUP in found.text and "img" not in found.tags and found.tags.count("script") == 3
    texts = [text for text in found.text if text.startswith("said ")]
    assert [text[:6] for text in texts] == ["said 5", "said 3"]
    assert all(text.endswith("xx end") and 1000 <= len(text) < 1100 for text in texts)
    assert {"0.625", "0.375"} <= set(found.text) and "not recorded: b" in found.text


def test_what_is_missing_is_said(tmp_path):
    runs = [make(tmp_path / "a", "a", steps=[{"reward": 1.0, "k3": 0.0}], end=False, flags={"x": 1})]
    runs += [make(tmp_path / "b", "b", steps=[{"k3": 1.0}], flags={"x": 2})]
    (tmp_path / "b" / "events.jsonl").write_text("{")
    runs[1] = Run.load(tmp_path / "b")
    text = " ".join(Elements(page(runs)).text)
    assert "not recorded: b" in text
    assert "a: 1 points are 0 or less and have no place on a log scale" in text
    assert "STOPPED before its end: step 1" in text
    assert "b: events.jsonl ends in half a line, which is left out" in text
    assert "Not recorded by any run: Gradient norm, Entropy, Response length" in text


def test_stages_that_do_not_fill_the_step_leave_other(tmp_path):
    steps = [{"seconds": {"step": 4.0, "rollout": 2.0, "capture": 0.5}}, {"seconds": {"step": 6.0, "rollout": 3.0}}]
    whole, r3 = stage_charts(variants_of([make(tmp_path / "a", "a", steps=steps)]))
    assert {key.name: found for key, found in whole.parts.items()} == {"rollout": [2.5], "other": [2.0], "R3": [0.5]}
    assert {key.name: found for key, found in r3.parts.items()} == {"capture": [0.1]}
    steps = [{"seconds": {"step": 1.0, "rollout": 1.0, "train": 1.0}}]
    (whole,) = stage_charts(variants_of([make(tmp_path / "b", "b", steps=steps)]))
    assert list(whole.notes) == ["b: stages overlap; they add up to 2.00 of the step"]
    assert "other" not in [key.name for key in whole.parts]


def test_a_run_without_a_step_is_a_page(tmp_path):
    assert "Figures" in page([make(tmp_path, "empty")])


def test_the_command_says_how_each_run_went(synthetic, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(synthetic / "r3-seed1"), str(synthetic / "live-seed1"), "--out", str(out)]) == 0
    verdict, other, first, second = capsys.readouterr().out.splitlines()
    assert verdict.startswith("r3-seed1: R3 on: ") and "times lower than `live-seed1`" in verdict
    assert other.startswith("live-seed1: R3 off: 0 of ")
    assert re.fullmatch(
        r"r3-seed1: 160 steps; reward 0\.1\d* -> 0\.8\d* \(first and last tenth\); k3 3\.\d\de-04; "
        r"R3 0\.5\d% of step time; engine restarted 1, trace damaged 1; .*page\.html",
        first,
    )
    assert "COLLAPSED" in second and "no faults" in second
    assert main(["report", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["report", str(synthetic / "r3-seed1"), "--out", str(tmp_path / "no" / "page.html")])
    assert ended.value.code == 2
    assert f"argument --out: {tmp_path / 'no'}: no such folder" in capsys.readouterr().err


def test_last_line_leaves_out_what_nobody_recorded(tmp_path):
    assert last_line(make(tmp_path, "x").summary, tmp_path / "p") == f"x: 0 steps; no faults; {tmp_path / 'p'}"


def test_each_step_is_a_line_where_nobody_watches(capsys):
    rows = {"replayed": 2048, "live": 2, "stale": 1}
    with run_progress("[red]x", total=3, done=1) as show:
        show(2, {"reward": 0.25, "k3": 1e-4, "rows": rows, "seconds": {"step": 4.25}}, "checkpoint 00000002")
        show(3, {})
        # After a fault a step is made again.
        show(2, {"reward": 0.5, "grad_norm": 0.0})
    assert [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()] == [
        "[red]x: step 2 of 3 reward 0.25 k3 0.0001 rows 2,048 replayed, 2 live, 1 stale 4.2 s checkpoint 00000002",
        "[red]x: step 3 of 3",
        "[red]x: step 2 of 3 reward 0.5 gradient norm 0 "
        "(nothing to learn: the samples of each prompt have the same reward)",
    ]


def test_a_bar_has_reward_and_k3_where_somebody_watches(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with run_progress("[red]x", total=3, done=1) as show:
        show(2, {"reward": 0.25, "k3": 1e-4})
        show(3, {"reward": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "[red]x" in shown and "reward 0.5" in shown and "3/3" in shown


def test_the_first_line_says_whether_replay_works(tmp_path, capsys):
    on = {"rows": {"replayed": 90, "live": 10, "stale": 0}, "k3": 1e-5, "agreement": {"0": 0.98, "1": 1.0}}
    off = {"rows": {"replayed": 0, "live": 100, "stale": 0}, "k3": 5e-5}
    runs = [make(tmp_path / "on", "on", steps=[on, on], flags={"r3": True})]
    runs += [make(tmp_path / "off", "off", steps=[off]), make(tmp_path / "bad", "bad", steps=[off], flags={"r3": True})]
    runs += [make(tmp_path / "none", "none", steps=[{"reward": 1.0}], flags={"num_rollout": 9}, end=False)]
    said = verdicts(runs)
    assert said == [
        "on: R3 on: 180 of 200 rows replayed, 0 stale; k3 1.00e-05, 5 times lower than `off`; "
        "live routers would have differed in 1.00% of experts",
        "off: R3 off: 0 of 100 rows replayed, 0 stale; k3 5.00e-05",
        "bad: R3 IS NOT WORKING, though it was asked for: 0 of 100 rows replayed, 0 stale; k3 5.00e-05",
        "none: whether R3 works cannot be told: no step has recorded its rows; STOPPED before its end: step 1 of 9",
    ]
    assert main(["report", *(str(tmp_path / run.name) for run in runs), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == said
    assert all(line in " ".join(Elements(page(runs)).text) for line in said)


def test_a_run_that_is_written_is_under_way_until_it_ends_or_dies(tmp_path, config):
    folder = tmp_path / "a"
    config["flags"] = {"num_rollout": 40}
    with pytest.raises(KeyboardInterrupt), RunLog(folder, config) as log:
        assert verdicts([Run.load(folder)])[0].endswith("; under way, no step yet")
        for step in range(12):
            log.step(step, {"reward": 1.0})
        assert verdicts([Run.load(folder)])[0].endswith("; under way, step 12 of 40")
        raise KeyboardInterrupt
    assert verdicts([Run.load(folder)])[0].endswith("; STOPPED before its end: step 12 of 40")
    with RunLog(folder, config, resume_at=12) as log:
        log.step(12, {"reward": 1.0})
    assert "step 13" not in verdicts([Run.load(folder)])[0]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [make(tmp_path / folder, "run", steps=[{"reward": 1.0}]) for folder in "ab"]
    assert [line.split(": ")[0] for line in verdicts(runs)] == [f"run ({tmp_path / folder})" for folder in "ab"]


def test_a_page_of_two_short_runs_is_small(synthetic):
    runs = [Run.load(synthetic / name) for name in ("live-seed1", "r3-seed1")]
    assert len(page([replace(run, steps=run.steps[:12]) for run in runs])) < 1_000_000


def test_loads_of_experts_are_drawn_where_they_are_recorded(tmp_path):
    even = {"ratio": 1.25, "worst": 2.5, "fullest": 5, "mean": 4.0, "busiest": 9}
    runs = [make(tmp_path / "a", "a", steps=[{"expert_load": even}] * 2)]
    assert LOADS in page(runs)
    assert line_chart(SECTIONS[LOADS][0], variants_of(runs), 1).series[0].y == [1.25, 1.25]
    assert LOADS not in page([make(tmp_path / "b", "b", steps=[{"reward": 1.0}])])


def test_k3_that_replay_does_not_lower_is_said(tmp_path):
    on = {"rows": {"replayed": 9, "live": 0}, "k3": 2e-5}
    off = {"rows": {"replayed": 0, "live": 9}, "k3": 1e-5}
    said = verdicts([make(tmp_path / "a", "a", steps=[on]), make(tmp_path / "b", "b", steps=[off])])
    assert said[0].endswith("k3 2.00e-05, NOT lower than `b`")
