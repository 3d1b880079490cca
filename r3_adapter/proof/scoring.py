"""Score samples on a real Megatron trainer: one process a rank, results put together.

R: response tokens of a sample.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from r3_adapter.errors import ReplayError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import ScoreRequest, TrainerOptions
from r3_adapter.processes import run_together
from r3_adapter.rollout import Sample, save_samples


@dataclass(frozen=True)
class Scores:
    """What the trainer found in one pass.

    logprobs: [R] float32 a sample.
    layers: by global decoder layer, what its router did: routes, routes_equal (it used all experts of the route and no
        others), ids, ids_equal, summed over ranks. A recomputed route counts again.
    tokens: tokens, those that have routes; tokens_equal, those of which a rank's routers used all routes; summed over
        ranks.
    grad_norm: of the training pass, before clipping.
    collectives: as r3_adapter.proof.collectives counts them, summed over ranks.
    why_not_planned: why a micro-batch's dispatch was not planned from its routes, by rank; no entry where all were.
    backend: by which hooks handed the routes over; "argument" without hooks.
    """

    logprobs: list[npt.NDArray[np.float32]]
    layers: dict[int, Mapping[str, int]]
    tokens: Mapping[str, int]
    grad_norm: float | None
    collectives: Mapping[str, int]
    why_not_planned: Mapping[int, str]
    backend: str

    @property
    def collectives_per_moe_layer(self) -> float:
        """Collectives that a rank enters in a forward pass of a MoE layer."""
        return self.collectives["in_layers"] / max(1, self.collectives["layers"])

    @property
    def routes_equal(self) -> int:
        return sum(counts["routes_equal"] for counts in self.layers.values())

    @property
    def agreement(self) -> dict[int, float]:
        """Share of the routes' experts that the routers used, by layer."""
        return {layer: counts["ids_equal"] / max(1, counts["ids"]) for layer, counts in self.layers.items()}


@dataclass(frozen=True)
class Work:
    """What one checkpoint is to score; see score. options: its own, in place of those of all."""

    checkpoint: Path
    samples: Sequence[Sample]
    beside: Sequence[Sample] = ()
    options: TrainerOptions | None = None


def score(
    checkpoint: Path,
    samples: Sequence[Sample],
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    *,
    passes: Sequence[str] = ("live", "replay"),
    beside: Sequence[Sample] = (),
    timeout: float = 600,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Scores]:
    """Start a trainer, one process a rank, and return its scores by pass.

    passes: some of PASSES.
    beside: more samples, which are replayed with the same weights in larger micro-batches; pass "beside" of what is
        returned has their scores. A multiple of BESIDE_MICRO_BATCH for each data-parallel rank, as `samples` are of
        the options' size.
    progress: called with samples done and to do, those of all passes together.

    Raises:
        R3Error: a rank failed or took longer than `timeout` seconds; the message says which and why.
    """
    works = [Work(checkpoint, samples, beside)]
    return score_each(works, layout, options, passes=passes, timeout=timeout, progress=progress)[0]


def score_each(
    works: Sequence[Work],
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    *,
    passes: Sequence[str] = ("live", "replay"),
    timeout: float = 600,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Scores]]:
    """Start one trainer that scores several checkpoints, one after the other; see score.

    Raises:
        R3Error: as there.
    """
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(index) for index in range(len(works))]
        for folder, work in zip(folders, works, strict=True):
            save_samples(folder / "samples", work.samples)
            if work.beside:
                save_samples(folder / "beside", work.beside)
            (folder / "out").mkdir()
            request = ScoreRequest(
                checkpoint=str(work.checkpoint.resolve()),
                samples=str(folder / "samples"),
                out=str(folder / "out"),
                rendezvous=str(folder / "rendezvous"),
                layout=asdict(layout),
                options=asdict(work.options or options or TrainerOptions()),
                passes=tuple(passes),
                beside=str(folder / "beside") if work.beside else "",
            )
            (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        ranks = range(layout.world_size)
        total = sum(len(passes) * len(work.samples) + len(work.beside) for work in works)

        def tick() -> None:
            progress(sum(path.stat().st_size for path in Path(name).glob("*/out/progress.*")), total)

        paths = [str(folder / "request.json") for folder in folders]
        run_together(
            [[sys.executable, "-m", "r3_adapter.proof.scoring_rank", *paths, str(rank)] for rank in ranks],
            env=[{"OMP_NUM_THREADS": "1"} for _ in ranks],
            timeout=timeout,
            tick=tick,
            what="trainer",
            each="rank",
        )
        found = []
        for folder, work in zip(folders, works, strict=True):
            of = {**dict.fromkeys(passes, work.samples), **({"beside": work.beside} if work.beside else {})}
            found.append({each: _gather(folder / "out", each, own) for each, own in of.items()})
        return found


def _gather(out: Path, name: str, samples: Sequence[Sample]) -> Scores:
    layers: dict[int, Counter[str]] = {}
    tokens, collectives = Counter[str](), Counter[str]()
    grad_norms, backends, why_not_planned = set(), set[str](), dict[int, str]()
    for path in out.glob(f"{name}.*.json"):
        of_rank = json.loads(path.read_text(encoding="utf-8"))
        grad_norms.add(of_rank["grad_norm"])
        backends.add(of_rank["backend"])
        tokens.update(of_rank["tokens"])
        collectives.update(of_rank["collectives"])
        if of_rank["why_not_planned"]:
            why_not_planned[int(path.suffixes[0][1:])] = of_rank["why_not_planned"]
        for layer, counts in of_rank["layers"].items():
            layers.setdefault(int(layer), Counter()).update(counts)
    found: dict[int, Any] = {}
    for path in out.glob(f"{name}.*.safetensors"):
        for key, logprobs in load_file(path).items():
            so_far = found.setdefault(int(key), np.full_like(logprobs, np.nan))
            if not np.isnan(so_far[~np.isnan(logprobs)]).all():
                raise ReplayError(f"sample {key}: a token was scored by two ranks")
            found[int(key)] = np.where(np.isnan(logprobs), so_far, logprobs)
    for index, sample in enumerate(samples):
        have = int(np.count_nonzero(~np.isnan(found[index]))) if index in found else 0
        if have != sample.num_response_tokens:
            raise ReplayError(f"sample {index}: {have} tokens scored != {sample.num_response_tokens}")
    if len(grad_norms) != 1:
        raise ReplayError(f"ranks have different norms of one gradient: {sorted(grad_norms)}")
    return Scores(
        [found[index] for index in range(len(samples))],
        dict(sorted(layers.items())),
        tokens,
        grad_norms.pop(),
        collectives,
        dict(sorted(why_not_planned.items())),
        " and ".join(sorted(backends)),
    )
