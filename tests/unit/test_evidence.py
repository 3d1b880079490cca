"""Gaps of right runs pass, whatever their noise; those of wrong ones do not, and be the floor as wrong as they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import R3Error
from r3_adapter.proof.evidence import MIN_SEEN_FLOAT32, Evidence, Gaps, Spread, tail_limit, weigh

SAMPLES, TOKENS = 32, 64
Noise = Callable[[np.random.Generator, tuple[int, ...]], Any]


def bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Rounding: normal, of tokens that are more or less sensitive."""
    return np.abs(rng.normal(0, 0.02, shape) * rng.uniform(0.2, 2, shape))


def exponential(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.exponential(0.03, shape)


def run(rng: np.random.Generator, noise: Noise = bfloat16) -> list[np.ndarray[Any, Any]]:
    return list(noise(rng, (SAMPLES, TOKENS)))


def with_wrong(rng: np.random.Generator, gaps: Gaps, share: float) -> list[np.ndarray[Any, Any]]:
    """Return gaps in which a share of the tokens is off by what a misplaced route does."""
    return [each + (rng.random(len(each)) < share) * rng.exponential(0.4, len(each)) for each in gaps]


def misplaced(rng: np.random.Generator, gaps: Gaps, effect: float = 0.4) -> list[np.ndarray[Any, Any]]:
    """Return each sample of gaps with one token off."""
    found = [each.copy() for each in gaps]
    for each in found:
        each[int(rng.integers(len(each)))] += rng.exponential(effect)
    return found


def judged(rng: np.random.Generator, noise: Noise = bfloat16, share: float = 0.0, **more: Any) -> Evidence:
    """Judge runs of which a share of the tokens has wrong routes, in the floor too."""
    floor, replay = (with_wrong(rng, run(rng, noise), share) for _ in range(2))
    apart = list(rng.exponential(1.0, (SAMPLES, TOKENS)))
    given = {"floor": floor, "live": apart, "shifted": apart, "misplaced": misplaced(rng, replay)}
    return weigh(replay, **{**given, **more})


@pytest.mark.parametrize("noise", [bfloat16, exponential])
def test_right_runs_pass(noise: Noise) -> None:
    """One run in 1,000 may be refused where tails are exponential, and the percentiles are estimates."""
    verdicts = [judged(np.random.default_rng(seed), noise, min_seen=0.0) for seed in range(200)]
    failed = [each.failures for each in verdicts if not each.passed]
    assert len(failed) <= (0 if noise is bfloat16 else 4), failed


@pytest.mark.parametrize("share", [0.001, 0.003, 0.01, 0.03, 0.1, 0.3])
def test_runs_with_wrong_routes_fail_though_the_floor_has_as_many(share: float) -> None:
    """How many pass is what the share of misplaced routes that are seen foretells."""
    passed, foretold = 0, 0.0
    for seed in range(100):
        evidence = judged(np.random.default_rng(seed), share=share)
        passed += evidence.passed
        foretold += (1 - evidence.seen_share) ** round(2 * share * SAMPLES * TOKENS)
    assert passed <= 2 * foretold + 2


def test_the_largest_gap_says_where_it_is() -> None:
    rng = np.random.default_rng(0)
    floor, replay = run(rng), run(rng)
    replay[5][17] = 0.9
    evidence = judged(rng, floor=floor)
    assert evidence.passed
    evidence = weigh(replay, floor=floor, shifted=[np.ones(300)], misplaced=misplaced(rng, replay))
    assert evidence.worst_at == (5, 17)
    assert evidence.failures == [
        f"largest gap after replay 9.00e-01 > {evidence.token_limit:.2e}, which the engine's own noise explains"
    ]


def test_small_faults_of_many_tokens_move_the_mean() -> None:
    rng = np.random.default_rng(0)
    replay = [np.minimum(each * 2.5, 0.15) for each in run(rng)]
    evidence = weigh(replay, floor=run(rng), shifted=[np.ones(300)], misplaced=misplaced(rng, replay))
    (failure,) = evidence.failures
    assert failure.startswith("mean gap after replay")


def test_without_contrast_nothing_was_proved() -> None:
    rng = np.random.default_rng(0)
    for name, said in (("live", "live routers"), ("shifted", "shifted routes")):
        more: Any = {name: run(rng)}
        (failure,) = judged(rng, **more).failures
        assert failure.startswith(f"mean gap with {said}") and failure.endswith("nothing was proved")


def test_routes_that_would_not_be_seen_prove_nothing() -> None:
    rng = np.random.default_rng(0)
    replay = run(rng)
    evidence = judged(rng, misplaced=misplaced(rng, replay, 0.05))
    assert evidence.seen_share < 0.1 and "single misplaced routes seen" in evidence.failures[0]
    seen = judged(rng, misplaced=[np.ones(3)] * 99 + [np.zeros(3)], min_seen=MIN_SEEN_FLOAT32)
    assert seen.passed and seen.seen_share == 0.99 and 0.94 < seen.seen_at_least < 0.99
    assert "in 99.0% of samples (99 of 100)" in seen.sentence
    assert seen.to_json()["constants"]["contrast"] == 3


def test_a_limit_that_is_known_is_not_estimated() -> None:
    rng = np.random.default_rng(0)
    assert judged(rng, known_limit=1e-3).failures[0].endswith("> 1.00e-03, which the engine's own noise explains")


def test_replay_can_be_its_own_floor() -> None:
    """Where nobody can run the engine unperturbed and perturbed: its bulk sets the limit for its outliers."""
    rng = np.random.default_rng(0)
    replay = run(rng)
    more: Any = {"shifted": [np.ones(300)], "misplaced": misplaced(rng, replay)}
    assert weigh(replay, **more).passed and weigh(replay, **more).floor is None
    replay[0][0] = 0.9
    assert not weigh(replay, **more).passed


def test_a_heavier_tail_gives_a_wider_limit() -> None:
    light, heavy = Spread(2000, 0.02, 0.04, 0.05, 0.07, 0.1), Spread(2000, 0.02, 0.04, 0.05, 0.1, 0.2)
    assert 0.1 < tail_limit(light, 2000) < tail_limit(heavy, 2000) < tail_limit(heavy, 4000)


@pytest.mark.parametrize(
    ("replay", "said"),
    [
        ([np.ones(10)], "10 tokens of replay < 200"),
        ([], "replay has no token"),
        ([np.array([0.0, np.nan])], "gap nan of token 1"),
        ([np.full(300, -1.0)], "gap -1.0 of token 0"),
    ],
)
def test_what_is_no_evidence_is_refused(replay: Gaps, said: str) -> None:
    with pytest.raises(R3Error, match=said):
        weigh(replay, shifted=[np.ones(3)], misplaced=[np.ones(3)])
    with pytest.raises(R3Error, match="no route was misplaced"):
        weigh([np.ones(300)], shifted=[np.ones(3)], misplaced=[])
