"""A proof of a server that runs already: nothing is perturbed, natural differences from the trainer are the signal.

In 16 bits an engine and a trainer choose other experts in about a tenth of all routes. Samples of the server are scored
by the trainer: routed live, with the routes that the server recorded, with routes shifted by a token, and with one
route misplaced in each sample. The trainer computes in float32 where the server does not, so that with the right
routes the server's rounding alone is left; the floor is the trainer's own rounding, of the same samples and routes in
the server's dtype. A quantised server rounds otherwise: its replay is judged by its own bulk.

Where live routing is as near as replay, as with a float32 engine on a CPU, routes that the engine took cannot be told
from those that any router would choose: then nothing was proved.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import check_choice
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.plan.preflight import check_gpus, check_trainer
from r3_adapter.proof.damage import Injection, damage, misplace
from r3_adapter.proof.evidence import CONTRAST, MIN_SEEN, MIN_SEEN_FLOAT32, Evidence, weigh
from r3_adapter.proof.scoring import Scores, score
from r3_adapter.proof.verdict import beside_injection, environment
from r3_adapter.report import ProgressCallback
from r3_adapter.rollout import Sample
from r3_adapter.sglang.served import Api, Served, ask, copy_with_dtype, served_at, sizes_of

NUM_SAMPLES = 32
MIN_ROUTES = 100
"""Routes that must differ at least: fewer are no sample of what a server may record wrongly."""
_Gaps = list[npt.NDArray[np.float64]]


@dataclass(frozen=True)
class ServerVerdict:
    """What was found of a server.

    trainer_dtypes: of live routing and the floor, and of all else.
    routes_replayed: of routes_expected, over all passes with routes.
    routes_naturally_other: those for which the trainer, routed live, chose other experts, of `routes`.
    routes_needed: so many would have to, for live routing to stand out; as far as a misplaced route tells.
    samples_visible: samples in which live routing is beyond what passes.
    """

    server: Mapping[str, Any]
    api: str
    layout: Mapping[str, Any]
    options: Mapping[str, Any]
    trainer_dtypes: tuple[str, str]
    samples: int
    tokens: int
    routes: int
    routes_expected: int
    routes_replayed: int
    routes_naturally_other: int
    routes_needed: int
    samples_visible: int
    evidence: Evidence
    about: Mapping[str, Any]

    @property
    def failures(self) -> list[str]:
        """Say what is wrong, with both operands; nothing if the test passed."""
        found = list(self.evidence.failures)
        if self.routes_replayed != self.routes_expected:
            found.insert(0, f"routes replayed {self.routes_replayed} != {self.routes_expected} routes recorded")
        if self.routes_naturally_other < MIN_ROUTES:
            differ = f"{self.routes_naturally_other} routes differ where routed live"
            found.append(f"{differ} < {MIN_ROUTES}: nothing was proved")
        return found

    @property
    def proved_nothing(self) -> bool:
        """Whether all is well but that live routing is as near as replay: no route shows that it was the engine's."""
        found = self.evidence
        well = found.replay.worst <= found.token_limit and found.replay.mean <= found.mean_limit
        apart = found.shifted.mean >= CONTRAST * found.replay.mean and self.routes_replayed == self.routes_expected
        near = found.live is not None and found.live.mean < CONTRAST * found.replay.mean
        return well and apart and (near or self.routes_naturally_other < MIN_ROUTES)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def sentence(self) -> str:
        """Say in words what was found."""
        injection = self.about.get("injection")
        spreads = self.evidence.sentence.replace("unperturbed", "rounding alone")
        share = self.routes_naturally_other / max(1, self.routes)
        counts = f"{self.routes_naturally_other:,} of {self.routes:,} routes ({share:.1%})"
        natural = f"{counts} have other experts where routed live"
        if self.passed:
            said = (
                f"passed: {natural}, which shows in {self.samples_visible} of {self.samples} samples; with the "
                f"server's routes replayed all {self.tokens:,} response tokens are within what rounding explains; "
                f"{spreads}"
            )
            return beside_injection(said, injection, passed=True)
        if self.proved_nothing:
            return (
                f"nothing was proved: {natural}, too few to tell replay from live routing; about "
                f"{self.routes_needed:,} would have to, as in a server in bfloat16 about a tenth has; {spreads}"
            )
        said = f"failed: {'; '.join(self.failures)}; {natural}; {spreads}"
        return beside_injection(said, injection, passed=False)

    def to_json(self) -> dict[str, Any]:
        """Return the report: the fields, the verdict, the sentence, and what it was found with."""
        return {
            **asdict(self),
            "evidence": self.evidence.to_json(),
            "passed": self.passed,
            "proved_nothing": self.proved_nothing,
            "sentence": self.sentence,
            **environment(),
        }


def prove_server(
    url: str,
    checkpoint: Path,
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    *,
    api: Api = "generate",
    seed: int = 0,
    num_samples: int = NUM_SAMPLES,
    injection: Injection | None = None,
    proxy: str | None = None,
    progress: Sequence[ProgressCallback] = (lambda done, total: None,) * 2,
) -> ServerVerdict:
    """Sample from a running server, replay in the patched Megatron-core on this machine, and judge.

    checkpoint: of the weights that the server has.
    options: of the trainer. seed: of the prompts, which are random tokens, and of the routes that are misplaced.
    injection: a damage done to the traces on their way; the test must then fail.
    progress: of the requests and of the trainer.

    Raises:
        R3Error: a layout that the model does not fit; a server that does not answer, records no routes, or is of
            another model; a reply that cannot be used.
    """
    if injection is not None:
        check_choice("injection", injection, Injection)
    options = options or TrainerOptions()
    check_trainer(checkpoint, layout, options)
    check_gpus(layout)
    served = served_at(url, checkpoint, proxy=proxy)
    rng = np.random.default_rng(seed)
    vocab = sizes_of(checkpoint)["vocab_size"]
    prompts = [rng.integers(3, vocab, rng.integers(4, 41)).tolist() for _ in range(num_samples)]
    lengths = rng.integers(32, 97, num_samples).tolist()
    samples = ask(served, api, prompts, lengths, checkpoint, proxy=proxy, progress=progress[0])
    if injection is not None:
        samples = damage(samples, injection)
    with tempfile.TemporaryDirectory() as name:
        passes = _score(Path(name), checkpoint, served, samples, layout, options, seed, progress[1])
    about = {"seed": seed, "injection": injection}
    return judge_server(served, api, samples, passes, layout, options, about)


@dataclass(frozen=True)
class Passes:
    """Scores of the samples routed live and replayed in the dtype `near`, and of all that is replayed in `far`.

    replayed: by name (replay, shifted, misplaced), the samples and [R] log-probabilities of each.
    expected: routes that had to be replayed. done: those that were.
    """

    dtypes: tuple[str, str]
    near: Mapping[str, Scores]
    replayed: Mapping[str, tuple[Sequence[Sample], Sequence[npt.NDArray[np.float32]]]]
    expected: int
    done: int


def _score(
    folder: Path,
    checkpoint: Path,
    served: Served,
    samples: Sequence[Sample],
    layout: ParallelLayout,
    options: TrainerOptions,
    seed: int,
    progress: ProgressCallback,
) -> Passes:
    near, far = ("bfloat16" if served.dtype == "bfloat16" else "float32"), "float32"
    size = options.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    parts: dict[str, Sequence[Sample]] = {
        "replay": samples,
        "shifted": damage(samples, "shift-token"),
        "misplaced": [sample for sample, _ in misplace(samples, seed)],
    }
    joined = [sample for part in parts.values() for sample in part]
    wanted = [_filled(samples, size), _filled(joined, size)]
    total = 2 * len(wanted[0]) + len(wanted[1])
    folders = [copy_with_dtype(checkpoint, folder / dtype, dtype) for dtype in dict.fromkeys((near, far))]
    first = score(
        folders[0],
        wanted[0],
        layout,
        options,
        passes=("live", "replay"),
        progress=lambda done, _: progress(done, total),
    )
    second = score(
        folders[-1],
        wanted[1],
        layout,
        options,
        passes=("replay",),
        progress=lambda done, _: progress(2 * len(wanted[0]) + done, total),
    )["replay"]
    found, at = dict[str, Any](), 0
    for name, part in parts.items():
        found[name] = (part, second.logprobs[at : at + len(part)])
        at += len(part)
    expected = sum(_num_routes(part) for part in wanted)
    return Passes((near, far), first, found, expected, first["replay"].routes_equal + second.routes_equal)


def judge_server(
    served: Served,
    api: str,
    samples: Sequence[Sample],
    passes: Passes,
    layout: ParallelLayout,
    options: TrainerOptions,
    about: Mapping[str, Any],
) -> ServerVerdict:
    gaps = {name: _gaps(part, logprobs) for name, (part, logprobs) in passes.replayed.items()}
    near = {name: found.logprobs[: len(samples)] for name, found in passes.near.items()}
    live = _gaps(samples, near["live"])
    floor = None
    if passes.dtypes[0] != passes.dtypes[1] and served.quantization is None:
        own = passes.replayed["replay"][1]
        floor = [np.abs(one - other).astype(np.float64) for one, other in zip(near["replay"], own, strict=True)]
    # As of an engine of the self-test: the noise of a quantised one hides most single routes.
    least = 0.0 if served.quantization else MIN_SEEN_FLOAT32 if served.dtype == "float32" else MIN_SEEN
    evidence = weigh(
        gaps["replay"], shifted=gaps["shifted"], misplaced=gaps["misplaced"], floor=floor, live=live, min_seen=least
    )
    live_layers = passes.near["live"].layers.values()
    routes = sum(counts["routes"] for counts in live_layers)
    return ServerVerdict(
        server=served.about,
        api=api,
        layout={**asdict(layout), "world_size": layout.world_size},
        options=asdict(options),
        trainer_dtypes=passes.dtypes,
        samples=len(samples),
        tokens=evidence.replay.tokens,
        routes=routes,
        routes_expected=passes.expected,
        routes_replayed=passes.done,
        routes_naturally_other=routes - sum(counts["routes_equal"] for counts in live_layers),
        routes_needed=_needed(evidence, gaps),
        samples_visible=sum(bool(each.max() > evidence.token_limit) for each in live),
        evidence=evidence,
        about=about,
    )


def _needed(evidence: Evidence, gaps: Mapping[str, _Gaps]) -> int:
    """Return how many routes must differ for live routing to have CONTRAST times replay's mean, MIN_ROUTES at least.

    Each adds to the sum of all gaps what a misplaced route adds to that of its sample.
    """
    added = sum(float(each.sum()) for each in gaps["misplaced"]) / evidence.misplaced
    added -= evidence.replay.mean * sum(map(len, gaps["misplaced"])) / evidence.misplaced
    wanted = (CONTRAST - 1) * evidence.replay.mean * evidence.replay.tokens
    return max(MIN_ROUTES, ceil(wanted / added) if added > 0 else evidence.replay.tokens)


def _gaps(samples: Sequence[Sample], logprobs: Sequence[npt.NDArray[np.float32]]) -> _Gaps:
    """Return [R] the distance of each response token's log-probability from the server's."""
    return [
        np.abs(own.astype(np.float64) - sample.logprobs)[sample.sampled]
        for sample, own in zip(samples, logprobs, strict=True)
    ]


def _filled(samples: Sequence[Sample], size: int) -> list[Sample]:
    """Return samples in a multiple of a size: one that is scored twice proves no less."""
    return [*samples, *islice(cycle(samples), -len(samples) % size)]


def _num_routes(samples: Sequence[Sample]) -> int:
    return sum(int(sample.trace.captured.sum()) * len(sample.trace.layer_ids) for sample in samples)
