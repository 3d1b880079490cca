"""The paper's table from real engines, on a tiny model: python benchmarks/paper/run.py writes results.json beside it.

Each seed trains a tiny Qwen3-MoE on right answers first. Then, with those weights, static figures over many response
tokens; then an RL run for each variant. The folder of the work keeps what is done: started again, it goes on.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy import PolicyOptions
from r3_adapter.megatron.request import TrainerOptions
from r3_adapter.megatron.trainer import score
from r3_adapter.metrics import gap, tail_share
from r3_adapter.processes import run_together
from r3_adapter.ray.cluster import cluster
from r3_adapter.ray.loop import Loop
from r3_adapter.ray.options import LoopOptions
from r3_adapter.ray.supervised import supervise
from r3_adapter.rl.losses import Objective
from r3_adapter.rl.tasks import END, VOCABULARY, task_named
from r3_adapter.rollout import Sample, load_samples, save_samples
from r3_adapter.runs.log import Run
from r3_adapter.sglang.cpu import cpu_environment
from r3_adapter.sglang.engine import rollout_in_subprocess
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.signals import run_command
from r3_adapter.tiny import TinyModel, write_checkpoint

TASK, LAYOUT = "sort", ParallelLayout()
MOE = TinyModel(num_layers=4, num_experts=16, topk=4, vocab_size=VOCABULARY, max_length=128, initializer_range=0.1)
# One expert as wide as the four that a token of the other model uses: the same code, and nothing to choose.
DENSE = replace(MOE, num_experts=1, topk=1, expert_size=4 * MOE.hidden_size // 2)
TAUS = (1.05, 1.1, 1.2, 1.5, 2.0, 3.0)
PARAMS = {"temperature": 1.0, "max_new_tokens": 12, "stop_token_ids": [END]}
GSPO = Objective("gspo", eps_clip=3e-4, eps_clip_high=4e-4)


@dataclass(frozen=True)
class Variant:
    """A way to train; dense: the model without a choice of experts."""

    options: PolicyOptions
    dense: bool = False


def variants(lr: float) -> dict[str, Variant]:
    """Return the paper's rows."""
    plain = PolicyOptions(lr=lr)
    return {
        "GRPO": Variant(plain),
        "GRPO+TIS": Variant(replace(plain, objective=Objective(tis_clip=2.0))),
        "GSPO": Variant(replace(plain, objective=GSPO)),
        "GRPO+R3": Variant(replace(plain, replay="r3")),
        "GSPO+R3": Variant(replace(plain, objective=GSPO, replay="r3")),
        "dense GRPO": Variant(plain, dense=True),
    }


def main() -> None:
    """Do what is not done yet, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("paper"), help="folder of checkpoints and runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="RL steps of a run")
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--static-samples", type=int, default=1152, help="of each seed")
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    with cluster():
        for seed in args.seeds:
            for dense in (False, True):
                once(checkpoint_of(args, seed, dense), lambda out, s=seed, d=dense: learn(args, s, d, out))
            for name, variant in variants(args.lr).items():
                once(run_of(args, name, seed), lambda out, v=variant, n=name, s=seed: train(args, n, v, s, out))
            once(args.work / f"stale-{seed}", lambda out, s=seed: age(args, s, out))
    for seed in args.seeds:
        for dense in (False, True):
            once(static_of(args, seed, dense), lambda out, s=seed, d=dense: measure(args, s, d, out))
        once(args.work / f"staleness-{seed}", lambda out, s=seed: measure_stale(args, s, out))
    args.out.write_text(json.dumps(results(args), indent=2) + "\n", encoding="utf-8")


def once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder unless it is there; a part of one is thrown away."""
    if folder.exists():
        return
    print(folder.name, flush=True)
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(folder)


def checkpoint_of(args: argparse.Namespace, seed: int, dense: bool) -> Path:
    return args.work / f"{'dense' if dense else 'moe'}-{seed}"


def run_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    return args.work / f"{name.replace(' ', '-')}-seed{seed}"


def static_of(args: argparse.Namespace, seed: int, dense: bool) -> Path:
    return args.work / f"static-{'dense' if dense else 'moe'}-{seed}"


def learn(args: argparse.Namespace, seed: int, dense: bool, out: Path) -> None:
    """Train a model on right answers."""
    write_checkpoint(out / "random", dtype="bfloat16", seed=seed, shape=DENSE if dense else MOE)
    options = PolicyOptions(lr=2e-3)
    loss = supervise(
        out / "random", out, task_named(TASK), LAYOUT, options, num_steps=args.sft_steps, batch_size=64, seed=seed
    )
    print(f"  loss {loss:.3f}", flush=True)


def loop_options(
    args: argparse.Namespace, folder: Path, checkpoint: Path, seed: int, options: PolicyOptions
) -> LoopOptions:
    return LoopOptions(
        folder=folder,
        checkpoint=checkpoint,
        layout=LAYOUT,
        policy=options,
        engine=EngineSettings(
            str(checkpoint), radix_cache=True, random_seed=seed, max_total_tokens=8192, max_running_requests=128
        ),
        task=TASK,
        sampling_params=PARAMS,
        batch_size=8,
        samples_per_prompt=8,
        micro_batch_size=64,
        num_rollouts=args.steps,
        seed=seed,
        save_interval=1000,
        agreement_interval=20,
        config={
            "name": folder.name.removeprefix("partial-"),
            "flags": {"lr": options.lr, "objective": str(options.objective), "replay": options.replay},
            "model": "tiny Qwen3-MoE",
            "layout": {},
            "seed": seed,
            "versions": versions(),
        },
    )


def train(args: argparse.Namespace, name: str, variant: Variant, seed: int, out: Path) -> None:
    """Make an RL run."""
    checkpoint = checkpoint_of(args, seed, variant.dense)
    options = loop_options(args, out / "run", checkpoint, seed, variant.options)
    config = {**options.config, "name": f"{name}-seed{seed}"}
    Loop(replace(options, config=config)).run()
    summary = Run.load(out / "run").summary
    print("  " + ", ".join(f"{key} {summary[key]:.3g}" for key in ("reward_first", "reward_last", "k3")), flush=True)


def age(args: argparse.Namespace, seed: int, out: Path) -> None:
    """Make the weights of some more steps, for routes that are that old."""
    policy = variants(args.lr)["GRPO+R3"].options

    def keep(loop: Loop, step: int, stage: str) -> None:
        if stage == "rollout" and step:
            shutil.copytree(out / "run" / "weights" / str(step), out / str(step))

    options = loop_options(args, out / "run", checkpoint_of(args, seed, False), seed, policy)
    Loop(replace(options, num_rollouts=9), keep).run()


def roll_out(args: argparse.Namespace, checkpoint: Path, seed: int, num_samples: int) -> list[Sample]:
    """Generate on-policy responses, each from a prompt of its own."""
    task, rng = task_named(TASK), np.random.default_rng([seed, 1])
    prompts = [task.prompt(rng) for _ in range(num_samples)]
    return rollout_in_subprocess(engine_settings(checkpoint, seed), prompts, PARAMS, batch_size=512, timeout=1200)


def engine_settings(checkpoint: Path, seed: int) -> EngineSettings:
    return EngineSettings(
        str(checkpoint), random_seed=seed, max_total_tokens=8192, max_running_requests=128, radix_cache=False
    )


def measure(args: argparse.Namespace, seed: int, dense: bool, out: Path) -> None:
    """Score a rollout on the trainer with the same weights: live, replayed, and both in another packing.

    And on the engine, all tokens at once: so far two ways to compute one model are apart in the same engine.
    """
    checkpoint = checkpoint_of(args, seed, dense)
    samples = roll_out(args, checkpoint, seed, args.static_samples)
    save_samples(out / "samples", samples)
    options = TrainerOptions(micro_batch_size=64, qkv_format="thd")
    found = score(checkpoint, samples, LAYOUT, options, timeout=1200)
    other = replace(options, micro_batch_size=16, qkv_format="sbhd")
    again = score(checkpoint, samples, LAYOUT, other, passes=("live", "replay"), timeout=1200)
    rollout = np.concatenate([sample.logprobs for sample in samples])
    figures: dict[str, Any] = {name: compare(np.concatenate(each.logprobs), rollout) for name, each in found.items()}
    # The trainer against itself, the same routes in both: what is left is rounding in another order.
    figures["floor"] = compare(np.concatenate(again["replay"].logprobs), np.concatenate(found["replay"].logprobs))
    figures["floor_live"] = compare(np.concatenate(again["live"].logprobs), np.concatenate(found["live"].logprobs))
    figures["engine"] = compare(rescore(engine_settings(checkpoint, seed), out), rollout)
    figures["routers_that_differ"] = 1 - equal_share(*found["live"].layers.values())
    figures["tokens_that_differ"] = 1 - equal_share(found["live"].tokens)
    (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def rescore(settings: EngineSettings, folder: Path) -> Any:
    """Return what the engine finds in one go for the samples of a folder."""
    script, out = Path(__file__).with_name("rescore.py"), folder / "engine.npy"
    command = [sys.executable, str(script), settings.to_json(), str(folder / "samples"), str(out)]
    run_together([command], env=[cpu_environment()], timeout=1200)
    return np.load(out)


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
    """Return the gap of the tokens that both know, with F(tau) at more values of tau."""
    known = ~np.isnan(ours)
    ours, theirs = ours[known], theirs[known]
    found, diff = gap(ours, theirs), ours.astype(np.float64) - theirs.astype(np.float64)
    curve = {str(tau): tail_share(diff, tau) for tau in TAUS}
    return {"tokens": found.tokens, "k3": found.k3, "f_2": found.f_2, "max_abs": found.max_abs, "f": curve}


def equal_share(*counts: Mapping[str, int]) -> float:
    """Return the share of rows in which a live router takes just the experts that the rollout did."""
    return sum(each["rows_equal"] for each in counts) / max(1, sum(each["rows"] for each in counts))


def measure_stale(args: argparse.Namespace, seed: int, out: Path) -> None:
    """Score one rollout with weights that are up to 8 steps newer, live and with its now stale routes."""
    first = checkpoint_of(args, seed, False)
    samples = load_samples(static_of(args, seed, False) / "samples")[: args.static_samples // 4]
    rollout = np.concatenate([sample.logprobs for sample in samples])
    figures = {}
    for lag in (0, 1, 2, 4, 8):
        weights = first if lag == 0 else args.work / f"stale-{seed}" / str(lag)
        options = TrainerOptions(micro_batch_size=48, qkv_format="thd")
        found = score(weights, samples, LAYOUT, options, timeout=1200)
        figures[str(lag)] = {name: compare(np.concatenate(each.logprobs), rollout) for name, each in found.items()}
    (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def results(args: argparse.Namespace) -> dict[str, Any]:
    """Put everything together."""
    seeds = args.seeds
    moe = [read(static_of(args, seed, False)) for seed in seeds]
    dense = [read(static_of(args, seed, True)) for seed in seeds]
    table: dict[str, Any] = {}
    for name in variants(args.lr):
        runs = [Run.load(run_of(args, name, seed) / "run") for seed in seeds]
        summaries = [run.summary for run in runs]
        table[name] = {
            "k3": average([each["k3"] for each in summaries]),
            "f2": average([each["f_2"] for each in summaries]),
            "reward": average([each["reward_last"] for each in summaries]),
            "reward_by_seed": [each["reward_last"] for each in summaries],
            "reward_first": average([each["reward_first"] for each in summaries]),
            "collapsed": sum(each["collapsed"] for each in summaries),
            "r3_share": average([each.get("r3_share", 0.0) for each in summaries]),
            "r3_stages": summaries[0]["r3_stages"],
            "seconds_a_step": average([each["seconds"] / each["steps"] for each in summaries]),
            "route_bytes_a_step": average([np.mean([s["bytes"]["routes"] for s in run.steps]) for run in runs]),
            "resident_bytes": {
                name: max(step["memory"][name] for run in runs for step in run.steps)
                for name in ("trainer_rss", "engine_rss")
            },
        }
    live, replay, floor = (average([each[key]["k3"] for each in moe]) for key in ("live", "replay", "engine"))
    f_live, f_replay = (average([each[key]["f_2"] for each in moe]) for key in ("live", "replay"))
    return {
        "command": "python benchmarks/paper/run.py --seeds "
        + " ".join(map(str, [*seeds, "--steps", args.steps, "--lr", args.lr])),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "versions": versions(),
        "response_tokens": sum(each["live"]["tokens"] for each in moe),
        "kl_ratio": replay / live,
        "f2_ratio": f_replay / f_live if f_live else None,
        "floor_k3": floor,
        "static": {"moe": merged(moe), "dense": merged(dense)},
        "rl": table,
        "staleness": {
            lag: {
                name: average([read(args.work / f"staleness-{s}")[lag][name]["k3"] for s in seeds])
                for name in ("live", "replay")
            }
            for lag in read(args.work / f"staleness-{seeds[0]}")
        },
    }


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over seeds of everything."""
    return {
        key: (
            merged([part[key] for part in parts])
            if isinstance(value, Mapping)
            else average([part[key] for part in parts])
        )
        for key, value in parts[0].items()
    }


def average(values: Sequence[Any]) -> float:
    return float(np.mean(values))


def read(folder: Path) -> Any:
    return json.loads((folder / "figures.json").read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("sglang", "megatron-core", "torch", "ray", "r3-adapter")}


if __name__ == "__main__":
    sys.exit(run_command("run.py", main, "what is done is in its folder: the same command goes on"))
