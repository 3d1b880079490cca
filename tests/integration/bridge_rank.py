"""One rank: python bridge_rank.py REQUEST.json RANK. Reads checkpoints, writes logits, and exports them again."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bridge_models
import torch

from r3_adapter.errors import ReplayError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.build import build_model, initialize
from r3_adapter.megatron.policy_trainer.checkpoint import template
from r3_adapter.megatron.policy_trainer.export import export_weights
from r3_adapter.megatron.policy_trainer.options import TrainerOptions

request, rank = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
layout = ParallelLayout(**request["layout"])
tokens = torch.tensor(request["tokens"])
initialize(layout, rank, request["rendezvous"])
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402


def logits_of(chunks: list[Any]) -> list[torch.Tensor]:
    """Return [b, s, V] on ranks of the last stage, elsewhere nothing; with tp, leave gradients of their weighted sum.

    On ranks that share nothing, Megatron's own experts with biases, as gpt-oss has them, compute no gradients.
    """
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    found: list[torch.Tensor] = []

    def loss(logits: torch.Tensor) -> Any:
        found.append(logits.detach())
        return (logits * bridge_models.weights_like(logits)).sum(), {}

    def step(_: Any, model: Any) -> Any:
        return model(tokens, positions, None, runtime_gather_output=True), loss

    with torch.set_grad_enabled(layout.tp > 1):
        get_forward_backward_func()(
            forward_step_func=lambda iterator, model: (
                model(tokens, positions, None, runtime_gather_output=True),
                loss,
            ),
            data_iterator=[iter([]) for _ in chunks] if len(chunks) > 1 else iter([]),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=layout.tp == 1,
        )
    return found


def norm_gradient(chunks: list[Any]) -> torch.Tensor | None:
    """Return this rank's gradient of the last norm of queries, which Megatron sums over tensor-parallel ranks."""
    norms = [weight for chunk in chunks for name, weight in chunk.named_parameters() if "q_layernorm.weight" in name]
    return norms[-1].grad if norms else None


def refusal(checkpoint: Path, lost: bool) -> str:
    """Return what is said of a checkpoint that cannot be read, or of a tensor of it that would not be written."""
    try:
        chunks = build_model(checkpoint, layout, TrainerOptions())
        like = template(checkpoint)
        if lost:
            like = replace(like, tensors={**like.tensors, "model.norm.bias": torch.empty(1, device="meta")})
        export_weights(chunks, like, Path(request["out"]) / "lost")
    except ReplayError as error:
        return str(error)
    return ""


for folder in request["checkpoints"]:
    checkpoint, out = Path(folder), Path(request["out"]) / Path(folder).name
    like = template(checkpoint, rank=rank, num_ranks=layout.world_size)
    chunks = build_model(checkpoint, layout, TrainerOptions())
    for found in logits_of([chunk.eval() for chunk in chunks]):
        out.mkdir(exist_ok=True, parents=True)
        torch.save((found, norm_gradient(chunks)), out / f"logits.{rank}.pt")
    export_weights(chunks, like, out / "export")
refused = {Path(folder).name: refusal(Path(folder), "lost" in folder) for folder in request.get("refused", ())}
if refused:
    Path(request["out"]).with_name("refused.json").write_text(json.dumps(refused), encoding="utf-8")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
