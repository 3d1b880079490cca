"""What `r3 prove` says in words and in its report, of a test that passed and of one that did not."""

from dataclasses import replace

import numpy as np
import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.trainer import Scores
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace
from r3_adapter.verdict import Verdict, judge

ROWS = 2 * 4


@pytest.fixture
def samples() -> list[Sample]:
    ids = np.zeros((5, 2, 1), np.uint8)
    versions = np.array([0, 0, 0, 0, -1], np.int32)
    trace = RoutingTrace(ids, np.arange(5, dtype=np.int32), versions, np.arange(2, dtype=np.int32), 4, ("0",))
    return [Sample(trace, 2, np.full(3, -1.0, np.float32), temperature=0.5) for _ in range(2)]


def judged(samples: list[Sample], *, replay: float = 0.0, live: float = -3.0, injection: str | None = None) -> Verdict:
    """Judge passes in which the second token of the second sample is off by so much."""

    def scores(off: float) -> Scores:
        logprobs = [sample.logprobs.copy() for sample in samples]
        logprobs[1][1] += np.float32(off)
        layers = {layer: {"rows": ROWS, "rows_equal": ROWS, "ids": ROWS, "ids_equal": ROWS} for layer in range(2)}
        return Scores(logprobs, layers, {}, None, {"in_layers": 3, "layers": 1, "count_exchanges": 0}, {}, "argument")

    found = {"live": scores(live), "replay": scores(replay), "train": scores(0.0)}
    about = {"seed": 3, "scene": {"group": 1}, "injection": injection}
    return judge(samples, found, ParallelLayout(), about=about)


def test_a_test_that_passed_says_what_it_has_shown(samples: list[Sample]) -> None:
    verdict = judged(samples, replay=-5e-6)
    assert verdict.passed
    assert verdict.sentence.startswith("passed: with routes replayed, all 6 response tokens are within 5.0e-06")
    assert "live routers are off by 3" in verdict.sentence
    assert "16 of 16 rows" in verdict.sentence
    report = verdict.to_json()
    assert report["limits"] == {"max_abs_dlogp_replay": 1e-4, "max_abs_dlogp_live": 1e-2}
    assert report["about"]["seed"] == 3
    assert report["versions"]["r3-adapter"] and set(report["patches"]) == {"sglang", "megatron-core"}


def test_a_test_that_failed_says_where_it_is_worst(samples: list[Sample]) -> None:
    verdict = judged(samples, replay=-0.25)
    assert (verdict.worst.sample, verdict.worst.position, verdict.worst.response_token) == (1, 3, 1)
    assert (verdict.worst.temperature, verdict.worst.pass_name) == (0.5, "replay")
    assert verdict.sentence == (
        "failed: max |d logp| after replay 2.50e-01 > 0.0001, at sample 1, position 3 (response token 1), in pass "
        "'replay': -1.250000 in the trainer, -1.000000 in the rollout"
    )


def test_a_planted_damage_is_told_from_a_broken_installation(samples: list[Sample]) -> None:
    assert judged(samples, replay=-1, injection="shift-token").sentence.endswith(
        "shift-token was planted, so it had to fail"
    )
    assert judged(samples, injection="shift-token").sentence.endswith("But shift-token was planted, and was not seen")


def test_live_routers_that_agree_and_rows_that_are_missing_prove_nothing(samples: list[Sample]) -> None:
    assert "nothing was proved" in judged(samples, live=-1e-3).sentence
    verdict = replace(judged(samples), rows_trained=15)
    assert verdict.sentence == "failed: rows replayed in training 15 != 16 rows with a route"
