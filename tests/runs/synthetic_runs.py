"""Writes folders of runs that never ran, with curves as a small run has them: python synthetic_runs.py FOLDER."""

import sys
from pathlib import Path

import numpy as np

from r3_adapter.runs.log import RunLog

VARIANTS = {
    "live": {"r3": False, "r2": False, "use_tis": False},
    "live-tis": {"r3": False, "r2": False, "use_tis": True},
    "r2": {"r3": False, "r2": True, "use_tis": False},
    "r3": {"r3": True, "r2": False, "use_tis": False},
}
LAYERS = range(8)


def write_run(folder, variant, seed, num_steps=160):
    flags = {**VARIANTS[variant], "seed": seed, "lr": 1e-4, "advantage_estimator": "grpo", "num_rollout": num_steps}
    config = {
        "name": f"{variant}-seed{seed}",
        "flags": flags,
        "model": "tiny Qwen3-MoE, 8 layers, 32 experts, top 4",
        "layout": {"tp": 2, "pp": 1, "vpp": 1, "cp": 1, "ep": 2, "etp": 1, "dp": 1},
        "seed": seed,
        "versions": {"sglang": "0.5.20", "megatron-core": "0.16.1", "torch": "2.13.0", "r3_adapter": "0.1.0"},
    }
    rng = np.random.default_rng([seed, *variant.encode()])
    falls_at = {"live": 70 + 15 * seed, "live-tis": 130 + 10 * seed}.get(variant, 10**6)
    with RunLog(folder, config, trackers={}) as log:
        for step in range(num_steps):
            if variant == "r3" and seed == 1 and step == 60:
                log.event(60, "engine_restarted", "engine 0 did not answer for 10 s; 16 prompts asked again")
            if variant == "r3" and seed == 1 and step == 97:
                log.event(97, "trace_damaged", "sample 12: digest 3f09.. != 77ab..; asked again")
            log.step(step, metrics_of(rng, variant, step, falls_at))


def metrics_of(rng, variant, step, falls_at):
    def noisy(value, share):
        return float(value * np.exp(share * rng.standard_normal()))

    fallen = float(np.clip((step - falls_at) / 12, 0, 1))
    reward = (0.08 + 0.8 / (1 + np.exp(-(step - 55) / 14))) * (1 - 0.93 * fallen) + 0.03 * rng.standard_normal()
    replays = variant == "r3"
    k3 = noisy((3e-4 if replays else 1.2e-2 * (1 + step / 60)) * (1 + 30 * fallen), 0.3)
    samples, rows = 128, 128 * 44 * len(LAYERS)
    tokens = int(samples * noisy(26 - 8 * reward, 0.05))
    seconds = {
        "rollout": noisy(2.1, 0.08),
        "old_logprobs": noisy(0.55, 0.05),
        "train": noisy(1.5, 0.05),
        "weights": noisy(0.2, 0.1),
    }
    if replays:
        seconds |= {
            "capture": noisy(0.008, 0.2),
            "transport": noisy(0.012, 0.3),
            "repack": noisy(0.002, 0.2),
            "replay": noisy(0.004, 0.2),
        }
    seconds["step"] = sum(seconds.values()) + noisy(0.15, 0.1)
    live = 0 if replays else rows
    step_metrics = {
        "weight_version": str(step),
        "reward": float(np.clip(reward, 0, 1)),
        "reward_std": noisy(0.3, 0.1),
        "loss": noisy(0.02, 0.3),
        "grad_norm": noisy(0.6 + 12 * fallen + (0 if replays else step / 300), 0.25),
        "entropy": noisy(2.4 - 1.4 * min(1, step / 150) + 0.9 * fallen, 0.03),
        "clip_fraction": noisy(0.01 * (1 + 10 * fallen), 0.3),
        "k3": k3,
        "f_1_2": min(1.0, 8 * k3),
        "f_2": 0.0 if replays and rng.random() < 0.7 else min(1.0, 0.6 * k3),
        "mean_abs": float(np.sqrt(k3)),
        "max_abs": noisy(20 * np.sqrt(k3), 0.2),
        "response_tokens": tokens,
        "samples": samples,
        "rows": {"replayed": rows - live, "live": live, "padding": int(rows * 0.031), "stale": 0},
        "seconds": seconds,
        "bytes": {"routes": 43.0 * tokens if replays else 0, "routes_pulled": 22.0 * tokens if replays else 0}
        | {"weights": 5_242_880},
        "memory": {"trainer_rss": 2.1e9 + 1e5 * step, "engine_rss": 1.7e9, "object_store": 8e6 + 43.0 * tokens},
    }
    if step % 5 == 0:
        drift = min(0.3, 0.02 + 0.0006 * step)
        step_metrics["agreement"] = {str(layer): 1 - noisy(drift * (1 + layer) / 8, 0.1) for layer in LAYERS}
    return step_metrics


def main():
    out = Path(sys.argv[1])
    for variant in VARIANTS:
        for seed in (1, 2, 3):
            write_run(out / f"{variant}-seed{seed}", variant, seed)


if __name__ == "__main__":
    main()
