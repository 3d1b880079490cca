"""What the self-test found: in a sentence, and in a report that says by itself what was tried, with what, and where."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from r3_adapter import patching
from r3_adapter.layout import ParallelLayout
from r3_adapter.machine import version_of
from r3_adapter.megatron.request import TrainerOptions
from r3_adapter.megatron.trainer import Scores
from r3_adapter.metrics import gap
from r3_adapter.rollout import Sample

MAX_REPLAY = 1e-4
"""Largest difference of log-probabilities after replay: float32 sums in another order stay an order below."""
MIN_LIVE = 1e-2
"""Smallest largest difference with live routers: below it the perturbation would prove nothing."""
_VERSIONS = ("r3-adapter", "sglang", "megatron-core", "torch", "transformers", "numpy")


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
    """What the self-test found; rows are (token, MoE layer) pairs with a route.

    rows_replayed: in a forward pass, as for old log-probabilities; rows_trained: in the training step after it, where a
        row counts if the recomputation, too, replays it. max_abs_dlogp_replay is the larger one of both passes.
    worst: where that is.
    collectives_per_moe_layer: that a rank enters in a forward pass of a MoE layer, on average, by pass.
    count_exchanges: all-gathers of token counts in MoE layers on all ranks, recomputation included, by pass.
    why_not_planned: by pass, why the dispatch of micro-batches was not planned from their routes, and so may exchange
        counts; no entry where all were planned.
    backend: by which hooks handed the routes over, "patch" or "native"; "argument" without hooks.
    about: seed, scene and injection of the test.
    """

    layout: Mapping[str, Any]
    options: Mapping[str, Any]
    tokens: int
    rows_expected: int
    rows_replayed: int
    rows_trained: int
    max_abs_dlogp_replay: float
    max_abs_dlogp_live: float
    worst: Worst
    collectives_per_moe_layer: Mapping[str, float]
    count_exchanges: Mapping[str, int]
    why_not_planned: Mapping[str, str]
    backend: str
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """Say what is wrong, with both operands; nothing if the test passed."""
        checks = {
            f"max |d logp| after replay {self.max_abs_dlogp_replay:.2e} > {MAX_REPLAY:g}, at {self.worst}": (
                self.max_abs_dlogp_replay <= MAX_REPLAY
            ),
            f"max |d logp| with live routers {self.max_abs_dlogp_live:.2e} < {MIN_LIVE:g}: nothing was proved": (
                self.max_abs_dlogp_live >= MIN_LIVE
            ),
            f"rows replayed {self.rows_replayed} != {self.rows_expected} rows with a route": (
                self.rows_replayed == self.rows_expected
            ),
            f"rows replayed in training {self.rows_trained} != {self.rows_expected} rows with a route": (
                self.rows_trained == self.rows_expected
            ),
        }
        for name in ("replay", "train"):
            exchanges = self.count_exchanges[name]
            text = f"{exchanges} exchanges of token counts in pass {name!r} != 0, and all of it was planned"
            checks[text] = exchanges == 0 or name in self.why_not_planned
        return [text for text, good in checks.items() if not good]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def sentence(self) -> str:
        """Say in words what was found."""
        injection = self.about.get("injection")
        if self.passed:
            said = (
                f"passed: with routes replayed, all {self.tokens:,} response tokens are within "
                f"{self.max_abs_dlogp_replay:.1e} of the rollout's log-probabilities (limit {MAX_REPLAY:g}), in a "
                f"forward pass and in a training step; live routers are off by {self.max_abs_dlogp_live:.3g}; "
                f"{self.rows_replayed:,} of {self.rows_expected:,} rows were replayed"
            )
            return f"{said}. But {injection} was planted, and was not seen" if injection else said
        said = f"failed: {'; '.join(self.failures)}"
        return f"{said}. {injection} was planted, so it had to fail" if injection else said

    def to_json(self) -> dict[str, Any]:
        """Return the report: the fields, `passed`, the sentence, the limits, and what it was found with."""
        return {
            **asdict(self),
            "passed": self.passed,
            "sentence": self.sentence,
            "limits": {"max_abs_dlogp_replay": MAX_REPLAY, "max_abs_dlogp_live": MIN_LIVE},
            **environment(),
        }


def environment() -> dict[str, Any]:
    """Return versions, patches and machine: what a result depends on beside its options."""
    versions = {"python": platform.python_version()}
    versions |= {name: version_of(name) or "not installed" for name in _VERSIONS}
    patches = {}
    for found in patching.status():
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
) -> Verdict:
    """Compare the trainer's scores, of all passes, with the rollout's samples.

    about: seed, scene and injection, for the report.
    """
    options = options or TrainerOptions()
    rollout = np.concatenate([sample.logprobs for sample in samples])
    worst = {mode: gap(np.concatenate(found.logprobs), rollout).max_abs for mode, found in scores.items()}
    replayed = "train" if worst["train"] > worst["replay"] else "replay"
    return Verdict(
        layout={**asdict(layout), "world_size": layout.world_size},
        options=asdict(options),
        tokens=len(rollout),
        rows_expected=sum(int(sample.trace.captured.sum()) * len(sample.trace.layer_ids) for sample in samples),
        rows_replayed=scores["replay"].rows_equal,
        rows_trained=scores["train"].rows_equal // (1 if options.recompute == "none" else 2),
        max_abs_dlogp_replay=worst[replayed],
        max_abs_dlogp_live=worst["live"],
        worst=_worst(samples, scores[replayed], replayed),
        collectives_per_moe_layer={name: round(found.collectives_per_moe_layer, 3) for name, found in scores.items()},
        count_exchanges={name: found.collectives["count_exchanges"] for name, found in scores.items()},
        why_not_planned={
            name: next(iter(found.why_not_planned.values()))
            for name, found in scores.items()
            if found.why_not_planned and name != "live"
        },
        backend=scores["replay"].backend,
        about=about or {},
    )


def _worst(samples: Sequence[Sample], found: Scores, name: str) -> Worst:
    gaps = [np.abs(own - sample.logprobs).max() for own, sample in zip(found.logprobs, samples, strict=True)]
    number = int(np.argmax(gaps))
    sample, own = samples[number], found.logprobs[number]
    token = int(np.argmax(np.abs(own - sample.logprobs)))
    return Worst(
        sample=number,
        position=sample.num_prompt_tokens + token,
        response_token=token,
        temperature=float(sample.temperature),
        pass_name=name,
        logprob_rollout=float(sample.logprobs[token]),
        logprob_trainer=float(own[token]),
    )
