"""Stage 0: how far trainer and engine are apart at fixed weights, for a shape and all precisions."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from design import PRECISIONS, SEARCH_SEED
from runs import LAYOUT, Sitting, engine_settings, once, sampling_params, start

from r3_adapter.metrics import gap, tail_share
from r3_adapter.processes import run_together
from r3_adapter.proof.scoring import Scores, score
from r3_adapter.ray.rounded import write_rounded
from r3_adapter.rl.tasks import task_named
from r3_adapter.rollout import load_samples, save_samples
from r3_adapter.sglang.cpu import cpu_environment
from r3_adapter.sglang.engine import rollout_in_subprocess

TAUS = (1.05, 1.1, 1.2, 1.5, 2.0, 3.0)
NUM_SAMPLES, TASK, TIMEOUT = 512, "running", 3600


def measure(sitting: Sitting, shape: str, precision: str, num_samples: int = NUM_SAMPLES) -> Path:
    """Measure a shape in a precision, unless it is done; return the folder of its figures.json."""

    def make(out: Path) -> None:
        chosen = PRECISIONS[precision]
        checkpoint = start(sitting, shape, TASK, SEARCH_SEED, dtype=chosen.trainer)
        rollout = _rollout(sitting, shape, chosen.weights, num_samples)
        sitting.check()
        samples = load_samples(rollout / "samples")
        found = score(checkpoint, samples, LAYOUT, chosen.trainer_options, timeout=TIMEOUT)
        (out / "figures.json").write_text(json.dumps(figures(found, samples, rollout)), encoding="utf-8")

    return once(sitting.work / f"static-{shape}-{precision}", make)


def _rollout(sitting: Sitting, shape: str, weights: str, num_samples: int) -> Path:
    """Return a folder with on-policy responses of the bfloat16 model, each to a prompt of its own."""

    def make(out: Path) -> None:
        checkpoint = start(sitting, shape, TASK, SEARCH_SEED, dtype="bfloat16")
        if weights == "fp8-rounded":
            checkpoint = write_rounded(checkpoint, out / "weights")
        task, rng = task_named(TASK), np.random.default_rng([SEARCH_SEED, 1])
        prompts = [task.prompt(rng) for _ in range(num_samples)]
        # With a cache of prefixes, scoring the samples again would find their own rows.
        settings = replace(engine_settings(checkpoint, SEARCH_SEED), radix_cache=False)
        samples = rollout_in_subprocess(settings, prompts, sampling_params(TASK), batch_size=256, timeout=TIMEOUT)
        save_samples(out / "samples", samples)
        rewards = [
            task.reward(prompt, sample.trace.token_ids[sample.num_prompt_tokens :].tolist())
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        (out / "reward.json").write_text(json.dumps(float(np.mean(rewards))), encoding="utf-8")
        script = Path(__file__).with_name("rescore.py")
        command = [sys.executable, str(script), settings.to_json(), str(out / "samples"), str(out / "engine.npy")]
        run_together([command], env=[cpu_environment()], timeout=TIMEOUT)

    return once(sitting.work / f"rollout-{shape}-{weights}", make)


def figures(found: Mapping[str, Scores], samples: Any, rollout: Path) -> dict[str, Any]:
    """Return what is published: live and replayed against the rollout, replayed against live, the engine itself."""
    theirs = np.concatenate([sample.logprobs for sample in samples])
    live, replay = (np.concatenate(found[name].logprobs) for name in ("live", "replay"))
    return {
        "live": compare(live, theirs),
        "replay": compare(replay, theirs),
        # What replay moves the trainer's own distribution by: R3's bias in a first optimizer step, which R2 has not.
        "bias": compare(replay, live),
        "engine": compare(np.load(rollout / "engine.npy"), theirs),
        "routers_that_differ": 1 - equal_share(*found["live"].layers.values()),
        "tokens_that_differ": 1 - equal_share(found["live"].tokens),
        "reward": json.loads((rollout / "reward.json").read_text(encoding="utf-8")),
    }


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
    """Return the gap of the tokens that both know, with F(tau) at more values of tau."""
    known = ~np.isnan(ours)
    ours, theirs = ours[known], theirs[known]
    found, diff = gap(ours, theirs), ours.astype(np.float64) - theirs.astype(np.float64)
    curve = {str(tau): tail_share(diff, tau) for tau in TAUS}
    return {"tokens": found.tokens, "k3": found.k3, "f_2": found.f_2, "max_abs": found.max_abs, "f": curve}


def equal_share(*counts: Mapping[str, int]) -> float:
    """Return the share of routes whose experts, and no others, a live router takes."""
    return sum(each["routes_equal"] for each in counts) / max(1, sum(each["routes"] for each in counts))
