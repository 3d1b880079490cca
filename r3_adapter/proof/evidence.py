"""Is replay right, in a dtype whose rounding is not known beforehand? Judge by what the very engine's noise explains.

A gap is |log p of the trainer - log p of the rollout| of a response token, times the temperature at which the sample is
scored: rounding moves logits, and a temperature of 0.5 doubles what is seen of it. R: response tokens of a sample.

What is compared. The floor: gaps of an unperturbed run of the same engine, replayed. Replay: those of the perturbed
run. Live routers, and routes shifted by a token, for contrast. Misplaced routes: replay with one route a
sample exchanged for another's.

A single wrong route moves the largest gap, so that is what is judged, against `token_limit`: where the tail of the
floor, going on as an exponential one, leaves FALSE_ALARM tokens of a run beyond it. In bfloat16 the tail falls faster
than that beyond the 95th percentile (measured: the largest of 2,000 tokens is 7 to 9 times the mean, the limit about 12
times), so that a false failure is rare; of the slopes from the 90th to the 95th and from there to the 99th percentile
the flatter one counts, in case it does not. The floor's own largest value would be a worse base: half of all right runs
exceed it, and one wrong route in the floor would hide as many in the replay. Percentiles hardly move until a hundredth
of the tokens is wrong; and the floor, too, must stay within the limit that its bulk gives.

A false pass. No limit is trusted: misplaced routes are judged by the same limit as replay, in the same samples, so
`seen_share` w is the chance that one wrong route shows, whatever made the limit what it is. k wrong routes all hide
with a chance of about (1 - w)^k. A fault in the floor widens the limit, and so lowers w: below `min_seen` nothing is
proved. Small faults of many tokens, none beyond the limit, move the mean: it must be within MEAN_FACTOR of the floor's.
Against faults of all routes, the mean with shifted routes and with live routers must be CONTRAST times replay's.

Misplaced routes are those of tokens that feed a scored one: a route of a prompt's token reaches a log-probability by
attention alone, and one of the last layer none at all.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import R3Error
from r3_adapter.rollout import Sample

FALSE_ALARM = 1e-3
"""Tokens of a right run that the limit may leave beyond it."""
MEAN_FACTOR = 2.0
"""Largest mean of replay, as a multiple of the floor's."""
CONTRAST = 3.0
"""Least mean with shifted routes or live routers, as a multiple of replay's."""
MIN_SEEN_FLOAT32, MIN_SEEN = 0.99, 0.25
"""Least share of misplaced routes that must be seen: in float32, and in bfloat16, where it is 0.5 to 0.97."""
MIN_TOKENS = 200
"""Tokens below which the tail of a run says nothing."""
_RESOLUTION = 1e-6
"""Of a log-probability in float32: no limit is below it."""
_ONE_SIDED_95 = 1.645

Logprobs = Sequence[npt.NDArray[np.floating[Any]]]
Gaps = Sequence[npt.NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Spread:
    """Gaps of a run: their number, mean, percentiles and largest."""

    tokens: int
    mean: float
    p90: float
    p95: float
    p99: float
    worst: float

    @classmethod
    def of(cls, name: str, gaps: Gaps) -> "Spread":
        """Summarise [R] gaps a sample.

        Raises:
            R3Error: no token, or a gap that is negative or not finite.
        """
        joined = np.concatenate([np.asarray(each, np.float64) for each in gaps]) if len(gaps) else np.empty(0)
        worst = _largest(name, joined)
        p90, p95, p99 = (float(each) for each in np.quantile(joined, (0.90, 0.95, 0.99)))
        return cls(joined.size, float(joined.mean()), p90, p95, p99, worst)


@dataclass(frozen=True)
class Evidence:
    """What speaks for and against replay being right.

    floor: of the unperturbed run; None if the limit comes from replay itself, so that only its outliers are seen.
    live: with live routers; None if none are needed for contrast, as with routes that nobody perturbed.
    worst_at: which entry of the replayed gaps, and which of its tokens, has the largest gap.
    token_limit: the largest gap that passes; mean_limit: the largest mean of replay.
    misplaced, seen: routes that were misplaced, one a sample, and those that showed beyond token_limit.
    min_seen: the least share of them that must.
    """

    floor: Spread | None
    replay: Spread
    live: Spread | None
    shifted: Spread
    worst_at: tuple[int, int]
    token_limit: float
    mean_limit: float
    misplaced: int
    seen: int
    min_seen: float

    @property
    def seen_share(self) -> float:
        """Share of single misplaced routes that show: the chance that one such route would have been seen."""
        return self.seen / self.misplaced

    @property
    def seen_at_least(self) -> float:
        """Return a bound below which seen_share's own value is with a chance of 5 %.

        Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
        """
        n, share, z = self.misplaced, self.seen_share, _ONE_SIDED_95
        middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n))

    @property
    def failures(self) -> list[str]:
        """Say what is wrong, with both operands; nothing if replay is right as far as this evidence goes."""
        text = f"largest gap after replay {self.replay.worst:.2e} > {self.token_limit:.2e}"
        largest = [] if self.replay.worst <= self.token_limit else [f"{text}, which the engine's own noise explains"]
        return largest + self.other_failures

    @property
    def other_failures(self) -> list[str]:
        """Failures beside that of the largest gap after replay."""
        checks = {
            f"mean gap after replay {self.replay.mean:.2e} > {self.mean_limit:.2e}": (
                self.replay.mean <= self.mean_limit
            ),
            f"{self.seen} of {self.misplaced} single misplaced routes seen, less than {self.min_seen:.0%}: nothing was "
            "proved": self.seen_share >= self.min_seen,
        }
        if self.floor is not None:
            text = f"largest gap of the unperturbed engine {self.floor.worst:.2e} > {self.token_limit:.2e}"
            checks[f"{text}, which its bulk explains"] = self.floor.worst <= self.token_limit
        for name, spread in (("live routers", self.live), ("shifted routes", self.shifted)):
            if spread is not None:
                text = f"mean gap with {name} {spread.mean:.2e} < {CONTRAST:g} times replay's {self.replay.mean:.2e}"
                checks[f"{text}: nothing was proved"] = spread.mean >= CONTRAST * self.replay.mean
        return [text for text, good in checks.items() if not good]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def sentence(self) -> str:
        """Say in words what the evidence is, whichever way it goes."""
        spreads = {"unperturbed": self.floor, "replayed": self.replay, "live": self.live, "shifted": self.shifted}
        said = ", ".join(f"{name} {each.mean:.1e} / {each.worst:.1e}" for name, each in spreads.items() if each)
        return (
            f"mean / largest gap: {said}; limit {self.token_limit:.1e}; a single misplaced route would be seen in "
            f"{self.seen_share:.1%} of samples ({self.seen} of {self.misplaced})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures, the verdict on them, and the constants behind it."""
        return {
            **asdict(self),
            "seen_share": self.seen_share,
            "seen_at_least": self.seen_at_least,
            "passed": self.passed,
            "failures": self.failures,
            "constants": {"false_alarm": FALSE_ALARM, "mean_factor": MEAN_FACTOR, "contrast": CONTRAST},
        }


def gaps_of(samples: Sequence[Sample], logprobs: Logprobs) -> list[npt.NDArray[np.float64]]:
    """Return [R] gaps a sample, of the tokens that the policy sampled.

    logprobs: [R] float a sample; the trainer's.

    Raises:
        R3Error: log-probabilities of other tokens.
    """
    found = []
    for index, (sample, own) in enumerate(zip(samples, logprobs, strict=True)):
        if own.shape != sample.logprobs.shape:
            raise R3Error(f"evidence: sample {index}: {own.shape} log-probabilities != {sample.logprobs.shape}")
        gap = np.abs(own.astype(np.float64) - sample.logprobs) * sample.temperature
        found.append(gap[sample.sampled])
    return found


def weigh(
    replay: Gaps,
    *,
    shifted: Gaps,
    misplaced: Gaps,
    floor: Gaps | None = None,
    live: Gaps | None = None,
    known_limit: float | None = None,
    min_seen: float = MIN_SEEN,
) -> Evidence:
    """Judge replay; each argument is [R] float gaps a sample, see the head of this file.

    replay: of all passes that are judged, one after the other.
    misplaced: of samples in which one route is another's.
    floor: of an unperturbed run of the same engine, replayed; None to judge replay by its own bulk.
    live: with live routers; to be given where selection was perturbed.
    known_limit: the largest gap that passes, where rounding is known, as in float32 on a CPU; None for the tail's.

    Raises:
        R3Error: gaps that are no finite numbers, or too few of them for a tail.
    """
    spread, bulk = Spread.of("replay", replay), Spread.of("replay" if floor is None else "floor", floor or replay)
    for name, each in (("replay", spread), ("floor", bulk)):
        if each.tokens < MIN_TOKENS:
            raise R3Error(f"evidence: {each.tokens} tokens of {name} < {MIN_TOKENS}: too few for a tail")
    if not len(misplaced):
        raise R3Error("evidence: no route was misplaced, so nothing is known of what would be seen")
    limit = tail_limit(bulk, spread.tokens) if known_limit is None else known_limit
    worst = max(range(len(replay)), key=lambda index: replay[index].max(initial=-1))
    return Evidence(
        floor=None if floor is None else bulk,
        replay=spread,
        live=None if live is None else Spread.of("live", live),
        shifted=Spread.of("shifted", shifted),
        worst_at=(worst, int(np.argmax(replay[worst]))),
        token_limit=limit,
        mean_limit=MEAN_FACTOR * bulk.mean + _RESOLUTION,
        misplaced=len(misplaced),
        seen=sum(_largest("misplaced", each) > limit for each in misplaced),
        min_seen=min_seen,
    )


def _largest(name: str, gaps: npt.NDArray[np.floating[Any]]) -> float:
    """Return the largest of [R] gaps; refuse what is none."""
    if not gaps.size:
        raise R3Error(f"evidence: {name} has no token")
    bad = np.flatnonzero(~(np.isfinite(gaps) & (gaps >= 0)))
    if len(bad):
        raise R3Error(f"evidence: {name}: gap {gaps[bad[0]]} of token {bad[0]} is not finite and at least 0")
    return float(gaps.max())


def tail_limit(bulk: Spread, tokens: int) -> float:
    """Return the gap beyond which `tokens` tokens of such a run have FALSE_ALARM ones, if its tail is exponential.

    An exponential tail falls by the same factor over each interval of the same length: from the 90th to the 95th
    percentile by 2, from there to the 99th by 5.
    """
    near, far = (bulk.p95 - bulk.p90) / math.log(2), (bulk.p99 - bulk.p95) / math.log(5)
    return bulk.p95 + max(near, far) * math.log(max(0.05 * tokens / FALSE_ALARM, 1)) + _RESOLUTION
