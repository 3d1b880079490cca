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
from r3_adapter.megatron.request import ScoreRequest, TrainerOptions
from r3_adapter.processes import run_together
from r3_adapter.rollout import Sample, save_samples


@dataclass(frozen=True)
class Scores:
    """What the trainer found in one pass.

    logprobs: [R] float32 a sample.
    layers: by global decoder layer, what its router did with the rows that have a route: rows, rows_equal (all experts
        are the route's), ids, ids_equal, summed over ranks. Recomputed rows count again.
    tokens: the tokens that have a route, and those of which all rows on the rank are the route's, summed over ranks.
    grad_norm: of the training pass, before clipping.
    collectives: as r3_adapter.megatron.collectives counts them, summed over ranks.
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
    def rows_equal(self) -> int:
        return sum(counts["rows_equal"] for counts in self.layers.values())

    @property
    def agreement(self) -> dict[int, float]:
        """Share of the routes' experts that the routers used, by layer."""
        return {layer: counts["ids_equal"] / max(1, counts["ids"]) for layer, counts in self.layers.items()}


def score(
    checkpoint: Path,
    samples: Sequence[Sample],
    layout: ParallelLayout,
    options: TrainerOptions | None = None,
    *,
    passes: Sequence[str] = ("live", "replay"),
    timeout: float = 600,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Scores]:
    """Start a trainer, one process a rank, and return its scores by pass.

    passes: some of PASSES.
    progress: called with samples done and to do, those of all passes together.

    Raises:
        R3Error: a rank failed or took longer than `timeout` seconds; the message says which and why.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_samples(folder / "samples", samples)
        (folder / "out").mkdir()
        request = ScoreRequest(
            checkpoint=str(checkpoint.resolve()),
            samples=str(folder / "samples"),
            out=str(folder / "out"),
            rendezvous=str(folder / "rendezvous"),
            layout=asdict(layout),
            options=asdict(options or TrainerOptions()),
            passes=tuple(passes),
        )
        path = folder / "request.json"
        path.write_text(json.dumps(asdict(request)), encoding="utf-8")
        ranks, total = range(layout.world_size), len(passes) * len(samples)

        def tick() -> None:
            progress(sum(path.stat().st_size for path in (folder / "out").glob("progress.*")), total)

        run_together(
            [[sys.executable, "-m", "r3_adapter.megatron.score", str(path), str(rank)] for rank in ranks],
            env=[{"OMP_NUM_THREADS": "1"} for _ in ranks],
            timeout=timeout,
            tick=tick,
            what="trainer",
            each="rank",
        )
        return {each: _gather(folder / "out", each, samples) for each in passes}


def _gather(out: Path, name: str, samples: Sequence[Sample]) -> Scores:
    layers: dict[int, Counter[str]] = {}
    tokens, collectives = Counter[str](), Counter[str]()
    grad_norms, backends, why_not_planned = set(), set[str](), dict[int, str]()
    for path in out.glob(f"{name}.*.json"):
        figures = json.loads(path.read_text(encoding="utf-8"))
        grad_norms.add(figures["grad_norm"])
        backends.add(figures["backend"])
        tokens.update(figures["tokens"])
        collectives.update(figures["collectives"])
        if figures["why_not_planned"]:
            why_not_planned[int(path.suffixes[0][1:])] = figures["why_not_planned"]
        for layer, counts in figures["layers"].items():
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
