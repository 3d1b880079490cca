"""Progress where nobody watches: few lines, each whole."""

import re

import pytest

from r3_adapter import report
from r3_adapter.report import progress_bars


def test_progress_is_said_as_it_begins_at_times_and_at_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "QUIET_S", 1e9)
    with progress_bars(("rollout", "trainer")) as (rollout, trainer):
        for done in range(5):
            rollout(done, 4)
            rollout(done, 4)
        trainer(0, 4)
        monkeypatch.setattr(report, "QUIET_S", 0)
        trainer(1, 4)
        trainer(1, 4)
    said = [re.sub(r" \(\d+\.\d s\)$", "", line) for line in capsys.readouterr().err.splitlines()]
    assert said == ["rollout: 0 of 4", "rollout: 4 of 4", "trainer: 0 of 4", "trainer: 1 of 4"]
