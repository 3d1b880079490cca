"""Run the scripts of docs/frameworks/own-loop.md and of the README as they stand, on one rank.

python readme_script.py CHECKPOINT RENDEZVOUS
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.batches import micro_batches
from r3_adapter.megatron.policy_trainer.build import build_model, initialize
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.replay import StepInput
from r3_adapter.rollout import Sample

REPO = Path(__file__).parents[2]


def scripts(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPO / page).read_text(encoding="utf-8"), re.DOTALL)


def main(argv: Sequence[str]) -> None:
    """Give the scripts what they take for granted: a checkpoint, prompts, a model, and padding."""
    checkpoint, rendezvous = map(Path, argv)
    whole, hooks, server = scripts("docs/frameworks/own-loop.md")
    # There is no server here; what it imports is.
    exec("\n".join(line for line in server.splitlines() if line.startswith("from ")), {})
    (short,) = scripts("README.md")
    layout = ParallelLayout()
    device = initialize(layout, 0, f"file://{rendezvous}")
    (model,) = build_model(checkpoint, layout, TrainerOptions())

    def pad(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = len(samples)
        (batch,) = micro_batches(samples, layout, 0, size=size, qkv_format="sbhd", device=device)
        return batch.tokens, batch.labels, batch.positions

    names: dict[str, Any] = {"checkpoint": str(checkpoint), "prompts": [[5, 6, 7], [9, 8]], "model": model, "pad": pad}
    exec(whole, names)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert names["batch"].routes.num_replayed == 2 + 1 + 2 * 32
    first = names["loss"].item()
    exec(short, names)
    assert names["loss"].item() == first
    # Hooks hand over the same routes.
    names["chunks"] = [model]
    names["micro_batches"] = [StepInput(names["traces"], names["tokens"])]
    names["the_framework_s_own_pass"] = lambda: model(
        names["tokens"], names["positions"], None, labels=names["labels"]
    ).mean()
    exec(hooks, names)
    assert names["loss"].item() == first


if __name__ == "__main__":
    main(sys.argv[1:])
