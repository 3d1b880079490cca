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
from r3_adapter.megatron.trainer import score
from r3_adapter.report import Tick
from r3_adapter.rl.preflight import check_trainer
from r3_adapter.rollout import Sample
from r3_adapter.sglang.engine import rollout_in_subprocess
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.tiny import ENGINE, TinyModel, qwen3_moe_config, write_checkpoint
from r3_adapter.trace import RoutingTrace
from r3_adapter.verdict import Verdict, judge

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
    about = {"seed": seed, "scene": asdict(scene), "injection": injection}
    return judge(samples, scores, layout, options, about)


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
