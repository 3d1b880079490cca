"""The self-test of an installation: perturb the rollout's experts, replay them in the trainer, compare.

A fifth of all routes of the rollout get random experts, weights still from the model's own logits, so that
live routing in the trainer is far off. Replay must bring every response token's log-probability back to the rollout's:
one route on a wrong token, layer or expert breaks that. In float32 on a CPU nothing else differs; elsewhere the same
engine, unperturbed, says what else does.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from r3_adapter.balance.table import FILE, by_chance
from r3_adapter.errors import R3Error, check_choice
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import BESIDE_MICRO_BATCH, PASSES, TrainerOptions
from r3_adapter.plan.preflight import check_gpus, check_trainer
from r3_adapter.proof.damage import Injection, damage, misplace
from r3_adapter.proof.engine import PERTURBED_SHARE, ProofEngine
from r3_adapter.proof.evidence import Evidence, Logprobs, gaps_of, weigh
from r3_adapter.proof.models import TINY, Model
from r3_adapter.proof.scoring import Scores, score
from r3_adapter.proof.tiny import TinyModel
from r3_adapter.proof.verdict import MAX_REPLAY, Verdict, judge
from r3_adapter.report import ProgressCallback
from r3_adapter.rollout import Sample
from r3_adapter.sglang.engine import Requests, floor_and_rollout

SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 100, "min_p": 0.01},
)
"""Of one sample after the other: the trainer scores each at its own temperature, and in the whole vocabulary."""
Place = Literal["random"]
SMALL_POOL = 640
"""KV slots that do not suffice for the 16 requests of a batch."""
ADMIT_ALL: Mapping[str, float] = {"schedule_conservativeness": 0.1}
"""At its default of 1.0 SGLang admits so few requests at once that the pool suffices if they sample short responses."""
FLOOR_SAMPLES = 16
"""Of the unperturbed engine: a thousand tokens, whose 99th percentile is that of ten."""
SHIFTED_SAMPLES = 8
MISPLACED_ROUNDS = 3
"""Routes that are misplaced in each sample, each in a copy of it."""


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


def prove(
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    *,
    model: Model = TINY,
    seed: int = 0,
    scene: Scene = Scene(),
    engine: ProofEngine | None = None,
    injection: Injection | None = None,
    place: Place | None = None,
    progress: Sequence[ProgressCallback] = (lambda done, total: None,) * 2,
) -> Verdict:
    """Run the self-test on a tiny model: rollout in the patched SGLang, replay in the patched Megatron-core.

    options: of the trainer.
    model: what is rolled out and trained, and whether SGLang generates or Hugging Face's model.
    scene: of the rollout.
    engine: as the user's own runs; by default in float32.
    injection: a damage of INJECTIONS, done to the traces on their way; the test must then fail.
    place: "random": the trainer's experts lie by chance, of the seed, other than in the checkpoint.
    progress: of the rollout and of the trainer.

    Raises:
        R3Error: a layout that the model does not fit, an engine that does not start or fails, routes that it refuses,
            or a damage or a placement that is not known.
    """
    if injection is not None:
        check_choice("injection", injection, Injection)
    if place is not None:
        check_choice("place", place, Place)
    engine = engine or ProofEngine()
    check_fits(layout, options, model, scene, engine)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.write(folder, dtype=engine.checkpoint_dtype, seed=seed)
        if model.engine == "sglang":
            floor, samples = rollouts(folder, seed=seed, scene=scene, engine=engine, progress=progress[0])
        else:
            floor, samples = hf_rollouts(folder, seed=seed, progress=progress[0])
        samples = _filled(samples, (options or TrainerOptions()).micro_batch_size, layout)
        if injection is not None:
            samples = damage(samples, injection)
        compared = Compared.of(floor, samples, seed)
        beside = _filled(compared.samples, BESIDE_MICRO_BATCH, layout)
        placed = _placed(options, place, samples, folder, seed)
        scores = score(folder, samples, layout, placed, passes=PASSES, beside=beside, progress=progress[1])
    evidence = compared.evidence(samples, scores, scores.pop("beside").logprobs, engine)
    about = {"seed": seed, "scene": asdict(scene), "injection": injection, "place": place}
    about |= {"engine": engine.to_json(), **model.about()}
    return judge(samples, scores, layout, options, about, evidence, exact=engine.is_exact)


def _placed(
    options: TrainerOptions | None, place: Place | None, samples: Sequence[Sample], folder: Path, seed: int
) -> TrainerOptions:
    """Return options by which experts lie as `place` says; the table is written into the folder."""
    options, trace = options or TrainerOptions(), samples[0].trace
    if place is None:
        return options
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Of a router that is limited to groups, which it knows by their place.
    num_groups = config.get("text_config", config).get("n_group") or 1
    table = by_chance(trace.layer_ids.tolist(), trace.num_experts, seed, num_groups)
    return replace(options, place=str(table.save(folder / FILE)))


def _filled(samples: Sequence[Sample], micro_batch_size: int, layout: ParallelLayout) -> list[Sample]:
    """Repeat samples until they are whole micro-batches of all ranks; one that is scored twice proves no less."""
    # Interleaved chunks take turns at as many micro-batches as there are stages.
    size = micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    return [*samples, *islice(cycle(samples), -len(samples) % size)]


@dataclass(frozen=True)
class Compared:
    """Samples that are replayed beside those that are judged: what replay is compared with.

    floor: of the unperturbed engine. shifted: with each token's route at the next one. misplaced: with one route of
    another token or layer.
    """

    floor: Sequence[Sample]
    shifted: Sequence[Sample]
    misplaced: Sequence[Sample]

    @classmethod
    def of(
        cls, floor: Sequence[Sample], samples: Sequence[Sample], seed: int, *, rounds: int = MISPLACED_ROUNDS
    ) -> "Compared":
        """Make what the perturbed engine's samples are compared with; rounds: copies with a wrong route in each."""
        copies = (misplace(samples, seed + number) for number in range(rounds))
        misplaced = [sample for sample, _ in chain.from_iterable(copies)]
        return cls(floor, damage(samples[:SHIFTED_SAMPLES], "shift-token"), misplaced)

    @property
    def samples(self) -> list[Sample]:
        """All of them, in the order of the fields."""
        return [*self.floor, *self.shifted, *self.misplaced]

    def evidence(
        self, samples: Sequence[Sample], scores: dict[str, Scores], beside: Logprobs, engine: ProofEngine
    ) -> Evidence:
        """Weigh replay of samples, in all passes, against the trainer's log-probabilities of these ones."""
        gaps = gaps_of(self.samples, beside[: len(self.samples)])
        at = np.cumsum([len(self.floor), len(self.shifted)])
        return weigh(
            [each for name in ("replay", "train") for each in gaps_of(samples, scores[name].logprobs)],
            floor=gaps[: at[0]],
            live=gaps_of(samples, scores["live"].logprobs),
            shifted=gaps[at[0] : at[1]],
            misplaced=gaps[at[1] :],
            known_limit=MAX_REPLAY if engine.is_exact else None,
            min_seen=engine.min_seen,
        )


def check_fits(
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    model: Model = TINY,
    scene: Scene = Scene(),
    engine: ProofEngine | None = None,
) -> None:
    """Refuse what Megatron would, once the rollout is done: a layout that the model cannot be cut for.

    Raises:
        R3Error: the first thing that does not fit, with both operands; or a model that this installation cannot train.
    """
    model.check()
    if model.engine == "transformers" and (scene != Scene() or (engine or ProofEngine()) != ProofEngine()):
        raise R3Error(f"{model.family}: Hugging Face's model generates here, which takes no arguments of an engine")
    with tempfile.TemporaryDirectory() as name:
        model.write_config(Path(name))
        check_trainer(Path(name), layout, options or TrainerOptions())
    check_gpus(layout)


def hf_rollouts(
    checkpoint: Path, *, seed: int, num_samples: int = 16, progress: ProgressCallback = lambda done, total: None
) -> tuple[list[Sample], list[Sample]]:
    """Let Hugging Face's model generate, unperturbed and perturbed; see perturbed_hf_rollout."""
    from r3_adapter.proof.hf_rollout import perturbed_hf_rollout

    floor = perturbed_hf_rollout(checkpoint, seed=seed + 1, fraction=0, num_samples=FLOOR_SAMPLES)
    samples = perturbed_hf_rollout(
        checkpoint, seed=seed, fraction=PERTURBED_SHARE, num_samples=num_samples, progress=progress
    )
    return floor, samples


def perturbed_rollout(checkpoint: Path, *, seed: int, **options: Any) -> list[Sample]:
    """Return the perturbed samples of rollouts, which says what the options are.

    Raises:
        R3Error: as rollouts.
    """
    return rollouts(checkpoint, seed=seed, num_floor=0, **options)[1]


def rollouts(
    checkpoint: Path,
    *,
    seed: int,
    num_samples: int = 32,
    num_floor: int = FLOOR_SAMPLES,
    scene: Scene = Scene(),
    engine: ProofEngine | None = None,
    progress: ProgressCallback = lambda done, total: None,
) -> tuple[list[Sample], list[Sample]]:
    """Generate from random prompts of 4 to 40 tokens, 32 to 96 tokens each: unperturbed, and then as the scene says.

    Samples are of different temperatures, so that no trainer passes that scores all at one.

    Raises:
        R3Error: the engine fails; or nothing was retracted, though the scene is about it.
    """
    rng = np.random.default_rng(seed)
    # Where requests are to be retracted all of them must ask for more than they were admitted for: SGLang 0.5.23 admits
    # for all that is asked where a request ignores the end of sequence.
    lengths = [128] * num_samples if scene.retract else None
    params: Any
    prompts, params = draw_requests(rng, num_samples, lengths)
    prompts = [prompts[index // scene.group] for index in range(num_samples)]
    follow_ups = []
    if scene.turns > 1:
        prompts, params = prompts[: max(1, num_samples // scene.turns)], params[0]
        follow_ups = [rng.integers(3, TinyModel().vocab_size, (scene.turns - 1, 8)).tolist() for _ in prompts]
    settings = (engine or ProofEngine()).settings(checkpoint, seed=seed)
    if scene.retract:
        settings = replace(settings, max_total_tokens=SMALL_POOL, extra={**ADMIT_ALL, **settings.extra})
    floor, samples = floor_and_rollout(
        settings,
        draw_requests(rng, num_floor),
        (prompts, params),
        recomputed="split",
        batch_size=16,
        follow_ups=follow_ups,
        progress=progress,
    )
    if scene.retract and len(samples) == len(prompts):
        raise R3Error(f"no request was retracted with a pool of {SMALL_POOL} tokens: nothing was proved")
    return floor, samples


def draw_requests(rng: np.random.Generator, count: int, lengths: Sequence[int] | None = None) -> Requests:
    """Draw prompts and their sampling parameters; lengths: of the responses, which may then end before."""
    vocab = TinyModel().vocab_size
    prompts = [rng.integers(3, vocab, rng.integers(4, 41)).tolist() for _ in range(count)]
    asked = rng.integers(32, 97, count).tolist() if lengths is None else lengths
    params = [
        {**SAMPLING[index % 3], "max_new_tokens": length, "ignore_eos": lengths is None}
        for index, length in enumerate(asked)
    ]
    return prompts, params
