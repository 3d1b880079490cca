"""What counts as a collapse: as in DESIGN.md, which says what was changed after runs had been seen."""

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Any

WINDOW, SHARE = 20, 0.5
IN_A_ROW, GRAD_TIMES, KL = 5, 100.0, 1.0

Series = Sequence[float | None]
"""A figure of each step; None where the run could not write it as a number."""


def collapse(reward: Series, grad_norm: Series, k3: Series) -> dict[str, int | None]:
    """Return for each rule the first step at which a run has collapsed by it; None if it has not."""
    first = [_finite(value) for value in grad_norm[:WINDOW]]
    usual = median(first) if len(first) == WINDOW else math.inf
    return {
        "reward": _reward(reward),
        "grad_norm": _above(grad_norm, GRAD_TIMES * usual),
        "kl": _above(k3, KL),
    }


def collapsed(found: dict[str, Any]) -> bool:
    """Say whether any rule held."""
    return any(step is not None for step in found.values())


def _reward(values: Series) -> int | None:
    """Return the step at which the mean of the last 20 steps first is below half of the best such mean so far.

    The reward of step 0, of weights that no step has changed, counts as one of these means.
    """
    sums = list(accumulate((_finite(value, 0.0) for value in values), initial=0.0))
    best = _finite(values[0], -math.inf) if values else -math.inf
    for end in range(WINDOW, len(sums)):
        mean = (sums[end] - sums[end - WINDOW]) / WINDOW
        best = max(best, mean)
        if best > 0 and mean < SHARE * best:
            return end - 1
    return None


def _above(values: Series, bound: float) -> int | None:
    run = 0
    for step, value in enumerate(values):
        if not math.isfinite(_finite(value)):
            return step
        run = run + 1 if _finite(value) > bound else 0
        if run == IN_A_ROW:
            return step
    return None


def _finite(value: float | None, otherwise: float = math.inf) -> float:
    return otherwise if value is None or not math.isfinite(value) else value
