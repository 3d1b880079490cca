"""Train on recorded rollouts with megatron.training's own loop, the rollouts' experts replayed.

The arguments are Megatron's and those of r3_adapter.arguments; `torchrun launch/pretrain_r3.py --help` lists them.
launch/pretrain_r3.sh has a set that runs anywhere.

b: samples of a micro-batch; s: sequence length.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from r3_adapter.arguments import add_r3_offline_arguments
from r3_adapter.errors import R3Error
from r3_adapter.megatron.pretraining import PreparedBatch, prepared
from r3_adapter.megatron.temperature import scored_at
from r3_adapter.rl.losses import k3
from r3_adapter.rollout import Sample, sample_folders
from r3_adapter.signals import run_command

DEFAULTS = {"tokenizer_type": "NullTokenizer", "dataloader_type": "external"}


def main() -> None:
    """Run Megatron's pretrain with this script's model, data and loss."""
    if not torch.cuda.is_available():
        from r3_adapter.megatron import cpu

        cpu.install_training()
        torch.set_num_threads(1)
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(add_r3_offline_arguments, args_defaults=DEFAULTS)
    check_arguments(args)
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank reads; pretraining.py says why
    # pretrain() takes no schedule: it asks this function for one, for training and for evaluation.
    schedule_of = training.get_forward_backward_func
    training.get_forward_backward_func = lambda *given, **named: with_replay(args, schedule_of(*given, **named))
    training.pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        # By name: their order differs between releases.
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        model_provider=partial(model_provider, []),
    )
    torch.distributed.destroy_process_group()


def check_arguments(args: Namespace) -> None:
    """Refuse arguments of Megatron's that this script does not follow.

    Raises:
        R3Error: Names the argument.
    """
    if args.r2:
        raise R3Error(
            "--r2 replays the trainer's own pass for old log-probabilities, and this loop makes none: use --r3"
        )
    if args.dataloader_type != "external":
        raise R3Error(f"--dataloader-type {args.dataloader_type} != external: the samples come in batches already")


def with_replay(args: Namespace, schedule: Any) -> Any:
    """Return Megatron's schedule with the preparation of its step before it."""
    from r3_adapter.megatron.batches import padded_micro_batch
    from r3_adapter.megatron.replay import current_layout

    rank, device = torch.distributed.get_rank(), torch.device(torch.cuda.current_device())
    return prepared(
        schedule,
        lambda samples: padded_micro_batch(samples, args.seq_length, current_layout(), rank, device),
        replay=args.r3,
        weight_version=args.r3_weight_version,
        staleness=args.r3_staleness,
    )


def model_provider(
    read_names: list[str],
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    """Build a model chunk as the arguments say, with the weights of --r3-hf-checkpoint if it is given.

    read_names: of the checkpoint's tensors, what earlier chunks of this rank have read.
    """
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from r3_adapter.megatron.checkpoint import Checkpoint
    from r3_adapter.megatron.model import build_chunk, check_all_read
    from r3_adapter.megatron.weights import load_weights

    args = get_args()
    model = build_chunk(
        config or core_transformer_config_from_args(args),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        rotary_base=args.rotary_base,
        tied=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
    )
    if args.r3_hf_checkpoint is not None:
        read_names += load_weights(model, args.r3_hf_checkpoint)
        if vp_stage in (None, (args.virtual_pipeline_model_parallel_size or 0) - 1):
            with Checkpoint(args.r3_hf_checkpoint) as checkpoint:
                check_all_read(args.r3_hf_checkpoint, checkpoint.names(), read_names)
    return model


def datasets_provider(
    num_samples: tuple[int, int, int], vp_stage: int | None = None
) -> tuple[Iterator[list[Sample]] | None, ...]:
    """Return this rank's micro-batches for training, validation and test; all are of --r3-traces."""
    from megatron.core import parallel_state as ps
    from megatron.training import get_args

    from r3_adapter.megatron.dataset import RolloutDataset, batches_of_rank

    args = get_args()
    folders = sample_folders(args.r3_traces)
    loaders = []
    for total, start in zip(num_samples, (args.consumed_train_samples, args.consumed_valid_samples, 0), strict=True):
        dataset = RolloutDataset(folders, num_samples=max(total or 0, start), seed=args.seed)
        loaders.append(
            batches_of_rank(
                dataset,
                start=start,
                micro_batch_size=args.micro_batch_size,
                dp_rank=ps.get_data_parallel_rank(),
                dp_size=ps.get_data_parallel_world_size(),
                num_workers=args.num_workers,
            )
        )
    return tuple(loaders)


def forward_step(
    data_iterator: Iterator[PreparedBatch], model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through a model chunk; return its output, and the loss as a function of it."""
    if return_schedule_plan:
        raise R3Error("--overlap-moe-expert-parallel-comm: its schedule plan has no argument for routes")
    step = next(data_iterator)
    if not isinstance(step, PreparedBatch):
        raise R3Error(f"the loop took its data past this script's preparation: {type(step).__name__} != PreparedBatch")
    batch = step.batch
    with scored_at(model, batch):
        output = model(batch.tokens, batch.positions, None, labels=batch.labels, **step.model_arguments)
    return output, partial(loss_func, step)


def loss_func(step: PreparedBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the response tokens' negative log-probabilities, their number, and what is reported.

    losses: [b, s]; each position's negative log-probability of the next token.
    """
    mask = step.batch.loss_mask
    total, count = (losses.float() * mask).sum(), mask.sum()
    # Tokens are of the rollout's distribution. In float64: with replay the differences are near float32's precision.
    divergence = k3(step.rollout_logprobs.double(), -losses.detach().double()[mask > 0]).sum().float()
    report = {"lm loss": torch.stack([total.detach(), count]), "k3 KL to rollout": torch.stack([divergence, count])}
    return total, count.to(torch.int), {**report, **step.row_shares}


if __name__ == "__main__":
    after = "the same command goes on from the last checkpoint that --save has, if there is one"
    sys.exit(run_command("pretrain_r3", main, after))
