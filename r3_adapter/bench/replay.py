"""`r3 bench replay`: a training step with replay over the same step routed live, on a real trainer with EP 2.

Host checks, cutting, copies and routers are all in the replayed step's time. `bench/shape.py` measures a router, a
MoE layer and a step of a model's shape instead, on a GPU or without one.
"""

import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import ScoreRequest, TrainerOptions
from r3_adapter.processes import run_together
from r3_adapter.proof.tiny import ENGINE, TinyModel, write_checkpoint
from r3_adapter.rollout import save_samples
from r3_adapter.sglang.engine import rollout_in_subprocess
from r3_adapter.sglang.settings import EngineSettings

SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 16, 112
WARM_UP = 2


def bench_replay(
    *, pairs: int = 20, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Alternate live and replayed steps of 4,096 tokens in one run; return medians and the median of paired ratios."""
    layout, options = ParallelLayout.smallest(ep=2), TrainerOptions(micro_batch_size=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", dtype="float32", seed=seed)
        prompts = np.random.default_rng(seed).integers(3, TinyModel().vocab_size, (SAMPLES, PROMPT_TOKENS)).tolist()
        settings = EngineSettings(model_path=str(folder / "model"), dtype="float32", random_seed=seed, **ENGINE)
        params = {"temperature": 1.0, "max_new_tokens": RESPONSE_TOKENS, "ignore_eos": True}
        save_samples(folder / "samples", rollout_in_subprocess(settings, prompts, params, batch_size=16))
        (folder / "out").mkdir()
        request = ScoreRequest(
            checkpoint=str(folder / "model"),
            samples=str(folder / "samples"),
            out=str(folder / "out"),
            rendezvous=str(folder / "rendezvous"),
            layout=asdict(layout),
            options=asdict(options),
            passes=_turns(pairs),
        )
        (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        done = folder / "out" / "progress"

        def tick() -> None:
            progress(done.stat().st_size if done.exists() else 0, len(request.passes))

        run_together(
            [
                [sys.executable, "-m", "r3_adapter.bench.replay_rank", str(folder / "request.json"), str(rank)]
                for rank in range(layout.world_size)
            ],
            env=[{"OMP_NUM_THREADS": "1"}] * layout.world_size,
            timeout=3600,
            tick=tick,
            what="trainer",
            each="rank",
        )
        seconds = json.loads((folder / "out" / "seconds.json").read_text(encoding="utf-8"))
    return _summary(seconds, layout)


def _turns(pairs: int) -> tuple[str, ...]:
    """Take turns, the one first and then the other, so that a drift of the machine cancels."""
    turns = [("live", "replay") if pair % 2 else ("replay", "live") for pair in range(WARM_UP + pairs)]
    return tuple(name for turn in turns for name in turn)


def _summary(seconds: dict[str, list[float]], layout: ParallelLayout) -> dict[str, Any]:
    live, replay, prepare = (seconds[name][WARM_UP:] for name in ("live", "replay", "prepare"))
    ratios = [after / before for before, after in zip(live, replay, strict=True)]
    model = TinyModel()
    return {
        "replay_over_live": statistics.median(ratios),
        "replay_over_live_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "seconds_live": statistics.median(live),
        "seconds_replay": statistics.median(replay),
        "seconds_prepare": statistics.median(prepare),
        "pairs": len(ratios),
        "tokens": SAMPLES * (PROMPT_TOKENS + RESPONSE_TOKENS),
        "model": asdict(model),
        "layout": {"ep": layout.ep, "world_size": layout.world_size},
        "machine": f"{platform.machine()}, {platform.processor() or 'CPU'}",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "sglang")},
    }
