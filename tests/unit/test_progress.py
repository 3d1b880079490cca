"""Progress where nobody watches: few lines, each whole."""

import re

import pytest

from r3_adapter import report
from r3_adapter.report import progress_bars


def test_progress_is_said_as_it_begins_at_times_and_at_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "QUIET_S", 1e9)
    with progress_bars({"rollout": "the engine starts", "trainer": "after the rollout"}) as (rollout, trainer):
        for done in range(5):
            rollout(done, 4)
            rollout(done, 4)
        trainer(0, 4)
        monkeypatch.setattr(report, "QUIET_S", 0)
        trainer(1, 4)
        trainer(1, 4)
    said = [re.sub(r" \(\d+\.\d s\)$", "", line) for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "rollout: the engine starts",
        "rollout: 0 of 4",
        "rollout: 4 of 4",
        "trainer: 0 of 4",
        "trainer: 1 of 4",
    ]


def test_a_bar_says_what_is_going_on_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bars({"rollout": "the engine starts", "trainer": "after the rollout"}) as (rollout, _):
        pass
    said = capsys.readouterr().err
    assert "the engine starts" in said and "after the rollout" in said and "/?" not in said
    with progress_bars({"rollout": "the engine starts"}) as (rollout,):
        rollout(3, 4)
    assert "3/4" in capsys.readouterr().err
