"""One route is misplaced where it matters and nowhere else; a damaged trace is well-formed and another."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3_adapter.errors import R3Error
from r3_adapter.proof.damage import INJECTIONS, damage, misplace
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace


def sample_of(ids: np.ndarray, prompt: int, sampled: Sequence[bool] | None = None) -> Sample:  # type: ignore[type-arg]
    tokens, layers = ids.shape[:2]
    ids[-1] = 0
    versions = np.array([0] * (tokens - 1) + [-1], np.int32)
    trace = RoutingTrace(
        ids.astype(np.uint8),
        np.arange(tokens, dtype=np.int32),
        versions,
        np.arange(layers, dtype=np.int32),
        8,
        ("0",),
    )
    response = tokens - prompt
    mask = None if sampled is None else np.array(sampled)
    return Sample(trace, prompt, np.full(response, -1.0, np.float32), sampled=mask)


def random_ids(rng: np.random.Generator, tokens: int, layers: int) -> np.ndarray:  # type: ignore[type-arg]
    """No two routes are of the same experts."""
    pairs = rng.permutation(list(combinations(range(8), 2)))[: tokens * layers]
    return pairs.reshape(tokens, layers, 2)


@given(seed=st.integers(0, 10_000), prompt=st.integers(1, 4), response=st.integers(1, 6), layers=st.integers(1, 2))
def test_one_route_is_misplaced_and_feeds_a_scored_token(seed: int, prompt: int, response: int, layers: int) -> None:
    rng = np.random.default_rng(seed)
    sampled = [True, *(rng.random(response - 1) < 0.5)]
    sample = sample_of(random_ids(rng, prompt + response, layers), prompt, sampled)
    if prompt + response < 3 and layers == 1:
        return  # A route alone has no other.
    for found, where in misplace([sample], seed):
        ids, was = found.trace.topk_ids, sample.trace.topk_ids
        assert np.argwhere((ids != was).any(2)).tolist() == [[where.position, where.layer]]
        assert set(ids[where.position, where.layer]) != set(was[where.position, where.layer])
        assert (ids[where.position, where.layer] == was[where.from_position, where.from_layer]).all()
        assert abs(where.position - where.from_position) <= 1 and where.from_position < prompt + response - 1
        assert sampled[where.position + 1 - prompt]


def test_routes_that_are_all_the_same_cannot_be_misplaced() -> None:
    same = sample_of(np.tile(np.arange(2), (6, 2, 1)), 2)
    other = sample_of(random_ids(np.random.default_rng(0), 6, 2), 2)
    assert len(misplace([same, other], 0)) == 1
    with pytest.raises(R3Error, match="no route of 1 samples can be misplaced"):
        misplace([same], 0)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_damage_moves_routes_and_leaves_the_rest(injection: str) -> None:
    rng = np.random.default_rng(0)
    samples = [sample_of(random_ids(rng, tokens, 3), 2) for tokens in (7, 5, 6)]
    for found, sample in zip(damage(samples, injection), samples, strict=True):  # type: ignore[arg-type]
        moved = injection != "swap-samples" or sample is not samples[2]
        assert (found.trace.digest != sample.trace.digest) == moved
        assert (found.trace.captured == sample.trace.captured).all()
        assert (found.trace.topk_ids[-1] == sample.trace.topk_ids[-1]).all()
