"""One rank of Megatron: its chunks must have the parameters that a plan counts.

python plan_parameters.py RANK CHECKPOINT RENDEZVOUS LAYOUT; exits 0, or fails with both numbers.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.build import build_model, initialize
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.plan.model import ModelShape
from r3_adapter.plan.stages import even_stages


def main(argv: Sequence[str]) -> None:
    """Build the rank's chunks and count."""
    rank, checkpoint, layout = int(argv[0]), Path(argv[1]), ParallelLayout(**json.loads(argv[3]))
    initialize(layout, rank, f"file://{argv[2]}")
    chunks = build_model(checkpoint, layout, TrainerOptions())
    found = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    model, pp_rank = ModelShape.from_file(checkpoint), layout.coords(rank).pp_rank
    layers = [layer for chunk in even_stages(model.moe.num_layers, layout)[pp_rank] for layer in chunk]
    held = model.rank_parameters(layers, layout, first=pp_rank == 0, last=pp_rank == layout.pp - 1)
    if found != sum(held):
        sys.exit(f"rank {rank}: {found} parameters != {sum(held)} of the plan ({held})")


if __name__ == "__main__":
    main(sys.argv[1:])
