"""One rank of a trainer that runs slime's passes, in our own words, with the plug-in that replays a rollout's routes.

python slime_rank.py CHECKPOINT SAMPLES SLIMELIKE OUT RANK; rank 0 writes what it found to OUT/found.json.
"""

import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from r3_adapter.errors import R3Error
from r3_adapter.frameworks import slime
from r3_adapter.frameworks.slime.rollout import ROUTES
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.build import build_model, build_optimizer, initialize
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.rollout import load_samples
from r3_adapter.sglang.moe_config import MoEConfig

LAYOUT = ParallelLayout(ep=2, dp=2)


def load(path: str) -> ModuleType:
    """Load the framework in our own words, under the names by which the plug-in finds slime's modules."""
    spec = importlib.util.spec_from_file_location("slime.like", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    trainers = [f"backends.megatron_utils.{name}" for name in ("initialize", "model", "actor", "cp_utils")]
    sys.modules.update(dict.fromkeys(["slime.like", *(f"slime.{name}" for name in ["ray.rollout", *trainers])], module))
    spec.loader.exec_module(module)
    return module


def arguments(checkpoint: Path) -> Namespace:
    moe = MoEConfig.from_checkpoint(checkpoint)
    return Namespace(
        num_layers=moe.num_layers,
        num_experts=moe.num_experts,
        moe_router_topk=moe.topk,
        moe_layer_freq=1,
        reward_scale=1.0,
        loss_type="policy_loss",
        data_pad_size_multiplier=8,
        allgather_cp=False,
    )


def shared_data(framework: ModuleType, args: Namespace, folder: Path, rank: int) -> dict[str, Any]:
    """Return this rank's training data of a rollout whose routes came as upstream's rows."""
    samples = []
    for index, sample in enumerate(load_samples(folder)):
        trace = sample.trace
        rows = np.zeros((trace.num_tokens - 1, args.num_layers, trace.topk), np.int32)
        rows[:, trace.layer_ids] = trace.topk_ids[:-1]
        length = trace.num_tokens - sample.num_prompt_tokens
        made = framework.Sample(trace.token_ids.tolist(), length, index=index, rollout_routed_experts=rows)
        made.rollout_log_probs = sample.logprobs.tolist()
        samples.append(made)
    own = list(range(rank, len(samples), LAYOUT.dp))
    batches = [[1, 0], list(range(2, len(own)))]
    return dict(framework.share_out(slime.convert(args, samples), own, batches))


def largest(found: dict[str, Any], data: dict[str, Any], key: str = "log_probs") -> float:
    """Return the largest difference from the rollout's log-probabilities, over all ranks."""
    own = torch.cat(found[key]) - torch.cat(data["rollout_log_probs"])
    worst = own.abs().max()
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    return float(worst)


def error(run: Callable[[], Any]) -> str:
    try:
        run()
    except R3Error as refused:
        return f"{type(refused).__name__}: {refused}"
    return "done"


def main(argv: list[str]) -> None:
    checkpoint, samples, path, out, rank = Path(argv[0]), Path(argv[1]), argv[2], Path(argv[3]), int(argv[4])
    initialize(LAYOUT, rank, f"file://{out / 'rendezvous'}")
    framework, args = load(path), arguments(checkpoint)
    model, optimizer = build_optimizer(build_model(checkpoint, LAYOUT, TrainerOptions()), distributed=False)
    data = shared_data(framework, args, samples, rank)
    batches = data["micro_batch_indices"]
    steps = [len(batches) // 2, len(batches) - len(batches) // 2]

    def scored(prefix: str = "") -> dict[str, Any]:
        iterator = [framework.DataIterator(data, batches)]
        return framework.forward_only(
            framework.get_log_probs_and_entropy, args, model, iterator, steps, store_prefix=prefix
        )

    said: dict[str, Any] = {"live": largest(scored(), data)}
    slime.init(args)
    found = scored()
    said |= {"replay": largest(found, data), "k3": max(found["r3/k3"])}
    reference = scored("ref_")
    said |= {"reference": largest(reference, data, "ref_log_probs"), "keys": sorted(reference)}
    iterator = [framework.DataIterator(data, batches)]
    said["steps"] = [
        framework.train_one_step(args, 0, step, iterator, model, optimizer, None, num, 4)[0]
        for step, num in enumerate(steps)
    ]
    for metrics in said["steps"]:
        metrics["loss"] = float(metrics["loss"])
    said["twice"] = error(lambda: slime.init(args))
    theirs = framework.get_batch

    def spoilt(*call: Any) -> dict[str, Any]:
        batch = theirs(*call)
        batch["tokens"][0, 5] += rank
        return dict(batch)

    framework.get_batch = spoilt
    said["another token on rank 1"] = error(scored)
    framework.get_batch = theirs
    kept = data[ROUTES]
    if rank == 1:
        data[ROUTES] = [kept[1], kept[0], *kept[2:]]
    said["two samples swapped on rank 1"] = error(scored)
    if rank == 1:
        del data[ROUTES]
    said["no routes on rank 1"] = error(scored)
    data[ROUTES] = kept
    said["after it"] = largest(scored(), data)
    if rank == 0:
        (out / "found.json").write_text(json.dumps(said), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
