"""How far trainer and rollout are apart: log-probability gaps, k3 KL, F(tau).

N: response tokens of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import R3Error

Logprobs = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Gap:
    """Summary of log p_trainer - log p_rollout over response tokens.

    mean_abs, max_abs: of the difference. k3: mean of r - 1 - log r with r = p_trainer / p_rollout, an unbiased and
    nonnegative estimate of KL(rollout || trainer). f_1_2, f_2: F(tau), the share of tokens with max(r, 1/r) > tau.
    """

    tokens: int
    mean_abs: float
    max_abs: float
    k3: float
    f_1_2: float
    f_2: float


def gap(trainer: Logprobs, rollout: Logprobs) -> Gap:
    """Compare log-probabilities of the same tokens.

    trainer, rollout: [N] float32 or float64; natural logarithms.

    Raises:
        R3Error: different shapes, no token, or a value that is not finite.

    Source: k3, J. Schulman, "Approximating KL Divergence" (2020); F(tau), arXiv 2510.11370.
    """
    if trainer.shape != rollout.shape or trainer.size == 0:
        raise R3Error(f"log-probabilities of the trainer {trainer.shape} != {rollout.shape} of the rollout, or empty")
    diff = trainer.astype(np.float64) - rollout.astype(np.float64)
    if not np.isfinite(diff).all():
        raise R3Error(f"log-probability at token {np.flatnonzero(~np.isfinite(diff))[0]} is not finite")
    return Gap(
        tokens=diff.size,
        mean_abs=float(np.abs(diff).mean()),
        max_abs=float(np.abs(diff).max()),
        k3=float((np.expm1(diff) - diff).mean()),
        f_1_2=tail_share(diff, 1.2),
        f_2=tail_share(diff, 2.0),
    )


def merge_gaps(gaps: Sequence[Gap]) -> Gap:
    """Return the gap over all tokens of parts that were compared apart.

    Raises:
        R3Error: no parts.
    """
    tokens = sum(each.tokens for each in gaps)
    if not tokens:
        raise R3Error("no gaps to merge")
    means = {
        name: sum(getattr(each, name) * each.tokens for each in gaps) / tokens
        for name in ("mean_abs", "k3", "f_1_2", "f_2")
    }
    return Gap(tokens=tokens, max_abs=max(each.max_abs for each in gaps), **means)


def tail_share(diff: npt.NDArray[np.float64], tau: float) -> float:
    """Return F(tau): the share of tokens whose probabilities differ by more than a factor of tau."""
    return float((np.abs(diff) > math.log(tau)).mean())
