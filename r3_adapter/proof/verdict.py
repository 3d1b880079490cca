"""What the self-test found: in a sentence, and in a report that says by itself what was tried, with what, and where."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from r3_adapter.layout import ParallelLayout
from r3_adapter.machine import version_of
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.metrics import gap
from r3_adapter.patch import packages
from r3_adapter.proof.evidence import Evidence
from r3_adapter.proof.scoring import Scores
from r3_adapter.rollout import Sample

MAX_REPLAY = 1e-4
"""Largest difference of log-probabilities after replay in float32 on a CPU: sums in another order differ by a tenth."""
MIN_LIVE = 1e-2
"""Smallest largest difference with live routers: below it the perturbation would prove nothing."""
_VERSIONS = ("r3-adapter", "sglang", "megatron-core", "megatron-bridge", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Worst:
    """The response token at which replay is farthest from the rollout.

    position: in the sample, from 0; response_token: of the response, from 0; temperature: of the sample.
    """

    sample: int
    position: int
    response_token: int
    temperature: float
    pass_name: str
    logprob_rollout: float
    logprob_trainer: float

    def __str__(self) -> str:
        return (
            f"sample {self.sample}, position {self.position} (response token {self.response_token}), in pass "
            f"{self.pass_name!r}: {self.logprob_trainer:.6f} in the trainer, {self.logprob_rollout:.6f} in the rollout"
        )


@dataclass(frozen=True)
class Verdict:
    """What the self-test found.

    routes_expected: that the samples have. routes_replayed: in a forward pass, as for old log-probabilities.
    routes_trained: in the training step after it, where a route counts if the recomputation, too, replays it.
    max_abs_dlogp_replay: the larger one of both passes. worst: where that is.
    collectives_per_moe_layer: that a rank enters in a forward pass of a MoE layer, on average, by pass.
    count_exchanges: all-gathers of token counts in MoE layers on all ranks, recomputation included, by pass.
    why_not_planned: by pass, why the dispatch of micro-batches was not planned from their routes, and so may exchange
        counts; no entry where all were planned.
    backend: by which hooks handed the routes over, "patch" or "native"; "argument" without hooks.
    about: seed, scene, engine and injection of the test.
    evidence: what replay was compared with; None if with nothing but the constants of this file.
    exact: whether MAX_REPLAY holds, since nothing but the order of float32 sums differs.
    """

    layout: Mapping[str, Any]
    options: Mapping[str, Any]
    tokens: int
    routes_expected: int
    routes_replayed: int
    routes_trained: int
    max_abs_dlogp_replay: float
    max_abs_dlogp_live: float
    worst: Worst
    collectives_per_moe_layer: Mapping[str, float]
    count_exchanges: Mapping[str, int]
    why_not_planned: Mapping[str, str]
    backend: str
    about: Mapping[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = None
    exact: bool = True

    @property
    def failures(self) -> list[str]:
        """Say what is wrong, with both operands; nothing if the test passed."""
        checks = {
            f"max |d logp| after replay {self.max_abs_dlogp_replay:.2e} > {MAX_REPLAY:g}, at {self.worst}": (
                self.max_abs_dlogp_replay <= MAX_REPLAY or not self.exact
            ),
            f"max |d logp| with live routers {self.max_abs_dlogp_live:.2e} < {MIN_LIVE:g}: nothing was proved": (
                self.max_abs_dlogp_live >= MIN_LIVE
            ),
            f"routes replayed {self.routes_replayed} != {self.routes_expected} routes recorded": (
                self.routes_replayed == self.routes_expected
            ),
            f"routes replayed in training {self.routes_trained} != {self.routes_expected} routes recorded": (
                self.routes_trained == self.routes_expected
            ),
        }
        for name in ("replay", "train"):
            exchanges = self.count_exchanges[name]
            text = f"{exchanges} exchanges of token counts in pass {name!r} != 0, and all of it was planned"
            checks[text] = exchanges == 0 or name in self.why_not_planned
        return [*self._against(), *(text for text, good in checks.items() if not good)]

    def _against(self) -> list[str]:
        """Return what the evidence says against replay, the first thing with the token at which it is worst."""
        if self.evidence is None:
            return []
        found = self.evidence.other_failures if self.exact else self.evidence.failures
        return [f"{text}; worst at {self.worst}" if index == 0 else text for index, text in enumerate(found)]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def sentence(self) -> str:
        """Say in words what was found."""
        injection = self.about.get("injection")
        if self.passed:
            said = (
                f"passed: with routes replayed, {self._measure()}, in a forward pass and in a training step; live "
                f"routers are off by {self.max_abs_dlogp_live:.3g}; "
                f"{self.routes_replayed:,} of {self.routes_expected:,} routes were replayed"
            )
            if self.evidence is not None:
                share, count = self.evidence.seen_share, self.evidence.misplaced
                said += f"; a single misplaced route would have been seen in {share:.1%} of samples (of {count})"
            for name, value in self.about.get("engine", {}).get("chosen", {}).items():
                said += f"; {name} {value!r} was chosen, since what SGLang chooses is not installed"
            return beside_injection(said, injection, passed=True)
        return beside_injection(f"failed: {'; '.join(self.failures)}", injection, passed=False)

    def _measure(self) -> str:
        """Say how near to the rollout replay is, and what that is measured against."""
        if self.exact or self.evidence is None:
            return (
                f"all {self.tokens:,} response tokens are within {self.max_abs_dlogp_replay:.1e} of the rollout's "
                f"log-probabilities (limit {MAX_REPLAY:g})"
            )
        floor = self.evidence.floor
        own = "" if floor is None else f"; unperturbed, the engine is off by {floor.worst:.1e}"
        return (
            f"all {self.tokens:,} response tokens are within {self.evidence.replay.worst:.1e} of the rollout's "
            f"log-probabilities times temperature (limit {self.evidence.token_limit:.1e}{own})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report: the fields, `passed`, the sentence, the limits, and what it was found with."""
        return {
            **asdict(self),
            "passed": self.passed,
            "sentence": self.sentence,
            "limits": {"max_abs_dlogp_replay": MAX_REPLAY if self.exact else None, "max_abs_dlogp_live": MIN_LIVE},
            "evidence": None if self.evidence is None else self.evidence.to_json(),
            **environment(),
        }


def beside_injection(said: str, injection: str | None, *, passed: bool) -> str:
    """Add to a verdict what a damage that was planted means for it."""
    if not injection:
        return said
    return (
        f"{said}. But {injection} was planted, and was not seen"
        if passed
        else f"{said}. {injection} was planted, so it had to fail"
    )


def environment() -> dict[str, Any]:
    """Return versions, patches and machine: what a result depends on beside its options."""
    versions = {"python": platform.python_version()}
    versions |= {name: version_of(name) or "not installed" for name in _VERSIONS}
    patches = {}
    for found in packages.status():
        after = {path: pins.after for path, pins in found.series.files.items()} if found.series else {}
        name = hashlib.sha256(json.dumps(after, sort_keys=True).encode()).hexdigest()[:16]
        patches[found.distribution] = {"state": str(found.state), "series": name if after else ""}
    machine = {"system": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()}
    return {"versions": versions, "patches": patches, "machine": machine}


def judge(
    samples: Sequence[Sample],
    scores: Mapping[str, Scores],
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    about: Mapping[str, Any] | None = None,
    evidence: Evidence | None = None,
    *,
    exact: bool = True,
) -> Verdict:
    """Compare the trainer's scores, of all passes, with the rollout's samples.

    about: seed, scene, engine and injection, for the report.
    evidence, exact: as Verdict has them.
    """
    options = options or TrainerOptions()
    rollout = np.concatenate([sample.logprobs for sample in samples])
    worst = {mode: gap(np.concatenate(found.logprobs), rollout).max_abs for mode, found in scores.items()}
    replayed = "train" if worst["train"] > worst["replay"] else "replay"
    return Verdict(
        layout={**asdict(layout), "world_size": layout.world_size},
        options=asdict(options),
        tokens=len(rollout),
        routes_expected=sum(int(sample.trace.captured.sum()) * len(sample.trace.layer_ids) for sample in samples),
        routes_replayed=scores["replay"].routes_equal,
        routes_trained=scores["train"].routes_equal // (1 if options.recompute == "none" else 2),
        max_abs_dlogp_replay=worst[replayed],
        max_abs_dlogp_live=worst["live"],
        worst=_worst(samples, scores, scaled=not exact),
        collectives_per_moe_layer={name: round(found.collectives_per_moe_layer, 3) for name, found in scores.items()},
        count_exchanges={name: found.collectives["count_exchanges"] for name, found in scores.items()},
        why_not_planned={
            name: next(iter(found.why_not_planned.values()))
            for name, found in scores.items()
            if found.why_not_planned and name != "live"
        },
        backend=scores["replay"].backend,
        about=about or {},
        evidence=evidence,
        exact=exact,
    )


def _worst(samples: Sequence[Sample], scores: Mapping[str, Scores], *, scaled: bool) -> Worst:
    """Return the token at which a replayed pass is farthest off; scaled: times the temperature, as evidence has it."""
    gaps = {
        (name, number, int(token)): float(gap[token] * (sample.temperature if scaled else 1))
        for name in ("replay", "train")
        for number, (own, sample) in enumerate(zip(scores[name].logprobs, samples, strict=True))
        for gap in [np.abs(own - sample.logprobs)]
        for token in [gap.argmax()]
    }
    name, number, token = max(gaps, key=lambda where: gaps[where])
    sample, own = samples[number], scores[name].logprobs[number]
    return Worst(
        sample=number,
        position=sample.num_prompt_tokens + token,
        response_token=token,
        temperature=float(sample.temperature),
        pass_name=name,
        logprob_rollout=float(sample.logprobs[token]),
        logprob_trainer=float(own[token]),
    )
