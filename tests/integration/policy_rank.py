"""One rank of a policy's trainer: python policy_rank.py REQUEST.json RANK.

Exports the weights as they were read, makes a step on samples, exports again, and writes its metrics.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.learning_rate import LearningRate
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.trainer import Item, PolicyOptions, PolicyTrainer
from r3_adapter.rl.losses import Objective
from r3_adapter.rollout import load_samples


def main(argv: Sequence[str]) -> None:
    request, rank = json.loads(Path(argv[0]).read_text(encoding="utf-8")), int(argv[1])
    layout, out = ParallelLayout(**request["layout"]), Path(request["out"])
    more = request["options"]
    if "lr" in more:
        more["lr"] = LearningRate(more["lr"])
    options = PolicyOptions(
        objective=Objective(**request["objective"]),
        trainer=TrainerOptions(qkv_format="thd", **request["trainer"]),
        **more,
    )
    folder = Path(request["checkpoint"])
    trainer = PolicyTrainer(
        folder,
        layout,
        rank,
        request["rendezvous"],
        options,
        reference=folder if options.objective.kl_coef else None,
    )
    if request["resume"]:
        trainer.load_optimizer(folder)
    trainer.export(out / "before")
    if request["forget"] and rank == 0:
        # A run deletes the checkpoint that it was begun from once there are newer ones.
        shutil.rmtree(folder)
    samples = load_samples(Path(request["samples"]))
    items = [
        Item(sample, advantage=request["advantages"][index], weight=request["weights"][index])
        for index, sample in enumerate(samples)
    ]
    mine = items[layout.coords(rank).dp_rank :: layout.dp]
    size = request["micro_batch_size"]
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    if request["batches"] is not None:
        batches = [[items[at] for at in batch] for batch in request["batches"][layout.coords(rank).dp_rank]]
    for step in range(request["num_steps"]):
        metrics = trainer.step(batches, count_agreement=True)
        trainer.save(out / f"after {step + 1}")
    if request["batches"] is not None:
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
        trainer.export(out / "gradients")
    (out / f"{rank}.json").write_text(json.dumps(asdict(metrics)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
