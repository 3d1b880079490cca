"""Calls are timed in turns, and what they make the machine do is counted."""

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from r3_adapter.bench.timing import Meter, in_turns  # noqa: E402


@given(st.integers(1, 8), st.integers(1, 40))
def test_turns_are_fair(count: int, rounds: int) -> None:
    names = [f"way {index}" for index in range(count)]
    orders = in_turns(names, rounds)
    assert [sorted(order) for order in orders] == [sorted(names)] * rounds
    # Over a whole cycle each is as often first as last, and runs behind each neighbour as often as before it.
    cycle = in_turns(names, 2 * count)
    assert sorted(order[0] for order in cycle) == sorted(order[-1] for order in cycle) == sorted(names * 2)
    behind = sorted((a, b) for order in cycle for a, b in pairwise(order))
    assert behind == sorted((b, a) for a, b in behind)


def test_without_a_gpu_operators_are_counted() -> None:
    meter = Meter(torch.device("cpu"))
    numbers = torch.ones(8)
    work = meter.work(lambda: numbers.mul(numbers).neg())
    assert work.launches == 2
    assert (work.waits, work.read_on_host) == ({}, 0)
    assert set(work.longest) == {"aten::mul", "aten::neg"}
    assert 0 < meter.launched(numbers.neg) < 1e6
