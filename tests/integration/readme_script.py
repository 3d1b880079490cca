"""Run the README's training script as it stands, on one rank: python readme_script.py CHECKPOINT RENDEZVOUS."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.batches import micro_batches
from r3_adapter.megatron.model import build_model, initialize
from r3_adapter.megatron.request import TrainerOptions
from r3_adapter.rollout import Sample


def main(argv: Sequence[str]) -> None:
    """Give the script what it takes for granted: a checkpoint, prompts, a model, and padding."""
    checkpoint, rendezvous = map(Path, argv)
    readme = Path(__file__).parents[2] / "README.md"
    (script,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    layout = ParallelLayout()
    device = initialize(layout, 0, f"file://{rendezvous}")
    (model,) = build_model(checkpoint, layout, TrainerOptions())

    def pad(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = len(samples)
        (batch,) = micro_batches(samples, layout, 0, size=size, qkv_format="sbhd", device=device)
        return batch.tokens, batch.labels, batch.positions

    names: dict[str, Any] = {"checkpoint": str(checkpoint), "prompts": [[5, 6, 7], [9, 8]], "model": model, "pad": pad}
    exec(script, names)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert names["batch"].routes.num_replayed == 2 + 1 + 2 * 32


if __name__ == "__main__":
    main(sys.argv[1:])
