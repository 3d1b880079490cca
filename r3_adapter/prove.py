"""The self-test of an installation: perturb the rollout's experts, replay them in the trainer, compare.

A fifth of all (token, layer) rows of the rollout get random experts, weights still from the model's own logits, so that
live routing in the trainer is far off. Replay must bring every response token's log-probability back to the rollout's:
one route on a wrong token, layer or expert breaks that. All in float32, where nothing else differs.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from r3_adapter.errors import R3Error, check_choice
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.request import PASSES, TrainerOptions
from r3_adapter.megatron.trainer import Scores, score
from r3_adapter.metrics import gap
from r3_adapter.report import Tick
from r3_adapter.rl.preflight import check_trainer
from r3_adapter.rollout import Sample
from r3_adapter.sglang.engine import rollout_in_subprocess
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.tiny import ENGINE, TinyModel, qwen3_moe_config, write_checkpoint
from r3_adapter.trace import RoutingTrace

PERTURBED_SHARE = 0.2
Injection = Literal["shift-token", "swap-layers", "swap-samples"]
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 100, "min_p": 0.01},
)
"""Of one sample after the other: the trainer scores each at its own temperature, and in the whole vocabulary."""
SMALL_POOL = 640
"""KV slots that do not suffice for the 16 requests of a batch."""
MAX_REPLAY = 1e-4
"""Largest difference of log-probabilities after replay: float32 sums in another order stay an order below."""
MIN_LIVE = 1e-2
"""Smallest largest difference with live routers: below it the perturbation would prove nothing."""


@dataclass(frozen=True)
class Verdict:
    """What the self-test found; rows are (token, MoE layer) pairs with a route.

    rows_replayed: in a forward pass, as for old log-probabilities; rows_trained: in the training step after it, where a
        row counts if the recomputation, too, replays it. max_abs_dlogp_replay is the larger one of both passes.
    collectives_per_moe_layer: that a rank enters in a forward pass of a MoE layer, on average, by pass.
    count_exchanges: all-gathers of token counts in MoE layers on all ranks, recomputation included, by pass.
    why_not_planned: by pass, why the dispatch of micro-batches was not planned from their routes, and so may exchange
        counts; no entry where all were planned.
    backend: by which hooks handed the routes over, "patch" or "native"; "argument" without hooks.
    """

    layout: Mapping[str, Any]
    options: Mapping[str, Any]
    tokens: int
    rows_expected: int
    rows_replayed: int
    rows_trained: int
    max_abs_dlogp_replay: float
    max_abs_dlogp_live: float
    collectives_per_moe_layer: Mapping[str, float]
    count_exchanges: Mapping[str, int]
    why_not_planned: Mapping[str, str]
    backend: str

    @property
    def failures(self) -> list[str]:
        """Say what is wrong, with both operands; nothing if the test passed."""
        checks = {
            f"max |d logp| after replay {self.max_abs_dlogp_replay:.2e} > {MAX_REPLAY:g}": (
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

    def to_json(self) -> dict[str, Any]:
        """Return the report: the fields and `passed`."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Scene:
    """How the rollout makes the engine compute tokens twice.

    group: samples of each prompt, in one batch.
    retract: the KV pool is too small for a batch, so requests are retracted and computed again.
    turns: of each conversation; a turn's routes are those from where the last one's ended.
    """

    group: int = 1
    retract: bool = False
    turns: int = 1

    def __post_init__(self) -> None:
        if self.group < 1 or self.turns < 1:
            raise R3Error(f"group ({self.group}) and turns ({self.turns}) must be 1 or more")
        if self.retract and self.turns > 1:
            raise R3Error(f"retract with turns ({self.turns}) > 1: conversations run one after the other")

    @property
    def radix_cache(self) -> bool:
        return self != Scene()


def prove(
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    *,
    seed: int = 0,
    scene: Scene = Scene(),
    injection: Injection | None = None,
    ticks: Sequence[Tick] = (lambda done, total: None,) * 2,
) -> Verdict:
    """Run the self-test on a tiny model: rollout in the patched SGLang, replay in the patched Megatron-core.

    options: of the trainer.
    scene: of the rollout; with any, the radix cache is on.
    injection: a damage of INJECTIONS, done to the traces on their way; the test must then fail.
    ticks: progress of the rollout and of the trainer.

    Raises:
        R3Error: a layout that the model does not fit, an engine that does not start or fails, routes that it refuses,
            or a damage that is not known.
    """
    if injection is not None:
        check_choice("injection", injection, Injection)
    check_fits(layout, options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, dtype="float32", seed=seed)
        samples = perturbed_rollout(folder, seed=seed, scene=scene, tick=ticks[0])
        # Interleaved chunks take turns at as many micro-batches as there are stages.
        size = (options or TrainerOptions()).micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
        # Micro-batches want a multiple; a sample that is scored twice proves no less.
        samples += islice(cycle(samples[:]), -len(samples) % size)
        if injection is not None:
            samples = damage(samples, injection)
        scores = score(folder, samples, layout, options, passes=PASSES, progress=ticks[1])
    return judge(samples, scores, layout, options)


def check_fits(layout: ParallelLayout, options: TrainerOptions | None = None) -> None:
    """Refuse what Megatron would, once the rollout is done: a layout that the tiny model cannot be cut for.

    Raises:
        R3Error: the first thing that does not fit, with both operands.
    """
    with tempfile.TemporaryDirectory() as name:
        qwen3_moe_config(TinyModel(), "float32").save_pretrained(name)
        check_trainer(Path(name), layout, options or TrainerOptions())


def perturbed_rollout(
    checkpoint: Path,
    *,
    seed: int,
    num_samples: int = 32,
    scene: Scene = Scene(),
    tick: Tick = lambda done, total: None,
) -> list[Sample]:
    """Generate from random prompts of 4 to 40 tokens, 32 to 96 tokens each, with a share of the rows perturbed.

    Samples are of different temperatures, so that no trainer passes that scores all at one.

    Raises:
        R3Error: the engine fails; or nothing was retracted, though the scene is about it.
    """
    rng = np.random.default_rng(seed)
    vocab = TinyModel().vocab_size
    prompts = [rng.integers(3, vocab, rng.integers(4, 41)).tolist() for _ in range(num_samples)]
    # Where requests are to be retracted all of them must ask for more than they were admitted for: SGLang 0.5.23 admits
    # for all that is asked where a request ignores the end of sequence.
    lengths = [128] * num_samples if scene.retract else rng.integers(32, 97, num_samples).tolist()
    params: Any = [
        {**SAMPLING[index % 3], "max_new_tokens": length, "ignore_eos": not scene.retract}
        for index, length in enumerate(lengths)
    ]
    prompts = [prompts[index // scene.group] for index in range(num_samples)]
    follow_ups = []
    if scene.turns > 1:
        prompts, params = prompts[: max(1, num_samples // scene.turns)], params[0]
        follow_ups = [rng.integers(3, vocab, (scene.turns - 1, 8)).tolist() for _ in prompts]
    settings = EngineSettings(
        model_path=str(checkpoint),
        dtype="float32",
        random_seed=seed,
        radix_cache=scene.radix_cache,
        **{**ENGINE, **({"max_total_tokens": SMALL_POOL} if scene.retract else {})},
        perturb=Perturbation(seed=seed, fraction=PERTURBED_SHARE),
    )
    samples = rollout_in_subprocess(
        settings, prompts, params, recomputed="split", batch_size=16, follow_ups=follow_ups, progress=tick
    )
    if scene.retract and len(samples) == len(prompts):
        raise R3Error(f"no request was retracted with a pool of {SMALL_POOL} tokens: nothing was proved")
    return samples


def judge(
    samples: Sequence[Sample],
    scores: Mapping[str, Scores],
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
) -> Verdict:
    """Compare the trainer's scores, of all passes, with the rollout's samples."""
    options = options or TrainerOptions()
    rollout = np.concatenate([sample.logprobs for sample in samples])
    worst = {mode: gap(np.concatenate(found.logprobs), rollout).max_abs for mode, found in scores.items()}
    return Verdict(
        layout={**asdict(layout), "world_size": layout.world_size},
        options=asdict(options),
        tokens=len(rollout),
        rows_expected=sum(int(sample.trace.captured.sum()) * len(sample.trace.layer_ids) for sample in samples),
        rows_replayed=scores["replay"].rows_equal,
        rows_trained=scores["train"].rows_equal // (1 if options.recompute == "none" else 2),
        max_abs_dlogp_replay=max(worst["replay"], worst["train"]),
        max_abs_dlogp_live=worst["live"],
        collectives_per_moe_layer={name: round(found.collectives_per_moe_layer, 3) for name, found in scores.items()},
        count_exchanges={name: found.collectives["count_exchanges"] for name, found in scores.items()},
        why_not_planned={
            name: next(iter(found.why_not_planned.values()))
            for name, found in scores.items()
            if found.why_not_planned and name != "live"
        },
        backend=scores["replay"].backend,
    )


def _shift_token(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Give each token the route of the one before it."""
    return [_with_rows(trace, np.roll(_rows(trace), 1, axis=0)) for trace in traces]


def _swap_layers(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Exchange the first two MoE layers."""
    return [_with_rows(trace, _rows(trace)[:, [1, 0, *range(2, trace.topk_ids.shape[1])]]) for trace in traces]


def _swap_samples(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Exchange the routes of the first two samples, as far as the shorter one goes."""
    first, second = _rows(traces[0]).copy(), _rows(traces[1]).copy()
    both = min(len(first), len(second))
    first[:both], second[:both] = second[:both].copy(), first[:both].copy()
    return [_with_rows(traces[0], first), _with_rows(traces[1], second), *traces[2:]]


INJECTIONS: Mapping[Injection, Callable[[Sequence[RoutingTrace]], list[RoutingTrace]]] = {
    "shift-token": _shift_token,
    "swap-layers": _swap_layers,
    "swap-samples": _swap_samples,
}


def damage(samples: Sequence[Sample], injection: Injection) -> list[Sample]:
    """Return samples whose traces are well-formed and wrong, in a way of INJECTIONS; the self-test must notice."""
    check_choice("injection", injection, Injection)
    traces = INJECTIONS[injection]([sample.trace for sample in samples])
    return [replace(sample, trace=trace) for sample, trace in zip(samples, traces, strict=True)]


def _rows(trace: RoutingTrace) -> np.ndarray[Any, Any]:
    return trace.topk_ids[trace.captured]


def _with_rows(trace: RoutingTrace, rows: np.ndarray[Any, Any]) -> RoutingTrace:
    topk_ids = trace.topk_ids.copy()
    topk_ids[trace.captured] = rows
    return replace(trace, topk_ids=topk_ids)
