"""Train on recorded rollouts with megatron.training's own loop, the rollouts' experts replayed.

The arguments are Megatron's and those of r3_adapter.arguments; `torchrun launch/pretrain_r3.py --help` lists them.
launch/pretrain_r3.sh has a set that runs anywhere.

b: samples of a micro-batch; s: sequence length; with packed samples b is 1.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from r3_adapter.arguments import add_r3_offline_arguments
from r3_adapter.errors import R3Error
from r3_adapter.megatron.pretrain_model import embedding_ranks, model_config, num_live_layers
from r3_adapter.megatron.pretrain_options import check_arguments, check_given
from r3_adapter.megatron.pretraining import PreparedBatch, prepared
from r3_adapter.megatron.temperature import scored_at
from r3_adapter.rl.losses import k3
from r3_adapter.rollout import Sample, sample_folders
from r3_adapter.signals import run_command

DEFAULTS = {"tokenizer_type": "NullTokenizer", "dataloader_type": "external"}


def main() -> None:
    """Run Megatron's pretrain with its own model, and this script's data and loss."""
    if not torch.cuda.is_available():
        from r3_adapter.megatron import cpu

        cpu.install_training()
        torch.set_num_threads(1)
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    check_given(sys.argv[1:], add_r3_offline_arguments)
    args = parse_and_validate_args(add_r3_offline_arguments, args_defaults=DEFAULTS)
    model = model_config(args)
    check_arguments(args, model.transformer)
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank reads; pretraining.py says why
    # pretrain() takes no schedule: it asks this function for one, for training and for evaluation.
    schedule_of = training.get_forward_backward_func
    training.get_forward_backward_func = lambda *given, **named: with_replay(args, schedule_of(*given, **named))
    training.pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets_provider,
        # By name: their order differs between releases.
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        get_embedding_ranks=lambda pp_ranks: embedding_ranks(pp_ranks, model.transformer),
    )
    torch.distributed.destroy_process_group()


def with_replay(args: Namespace, schedule: Any) -> Any:
    """Return Megatron's schedule with the preparation of its step before it."""
    from r3_adapter.megatron.batches import packed_micro_batch, padded_micro_batch
    from r3_adapter.megatron.replay import current_layout

    rank, device = torch.distributed.get_rank(), torch.device(torch.cuda.current_device())

    def to_batch(samples: list[Sample]) -> Any:
        if args.dataloader_inter_document_masking:
            return packed_micro_batch(samples, current_layout(), rank, device, seq_length=args.seq_length)
        return padded_micro_batch(samples, args.seq_length, current_layout(), rank, device)

    return prepared(
        schedule,
        to_batch,
        replay=args.r3,
        weight_version=args.r3_weight_version,
        staleness=args.r3_staleness,
    )


def datasets_provider(
    num_items: tuple[int, int, int], vp_stage: int | None = None
) -> tuple[Iterator[list[Sample]] | None, ...]:
    """Return this rank's micro-batches for training, validation and test; all are of --r3-traces.

    num_items: samples, or sequences of packed ones, for each of the three.
    """
    from megatron.core import parallel_state as ps
    from megatron.training import get_args

    from r3_adapter.megatron.batches import padded_length_of
    from r3_adapter.megatron.dataset import PackedRollouts, RolloutDataset, batches_of_rank
    from r3_adapter.megatron.replay import current_layout

    args = get_args()
    folders = sample_folders(args.r3_traces)
    loaders = []
    starts = (args.consumed_train_samples, args.consumed_valid_samples, 0)
    sizes = (args.micro_batch_size, args.eval_micro_batch_size, args.eval_micro_batch_size)
    for total, start, size in zip(num_items, starts, sizes, strict=True):
        number = max(total or 0, start)
        dataset: RolloutDataset | PackedRollouts
        if args.dataloader_inter_document_masking:
            length = partial(padded_length_of, layout=current_layout())
            dataset = PackedRollouts(
                folders, num_sequences=number, seq_length=args.seq_length, padded_length=length, seed=args.seed
            )
        else:
            dataset = RolloutDataset(folders, num_samples=number, seed=args.seed)
        loaders.append(
            batches_of_rank(
                dataset,
                start=start,
                micro_batch_size=size,
                dp_rank=ps.get_data_parallel_rank(),
                dp_size=ps.get_data_parallel_world_size(),
                num_workers=args.num_workers,
            )
        )
    return tuple(loaders)


def forward_step(data_iterator: Iterator[PreparedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through a model chunk; return its output, and the loss as a function of it."""
    from megatron.core.utils import get_model_config

    step = next(data_iterator)
    if not isinstance(step, PreparedBatch):
        raise R3Error(f"the loop took its data past this script's preparation: {type(step).__name__} != PreparedBatch")
    batch, config = step.batch, get_model_config(model)
    with scored_at(model, batch):
        output = model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.labels,
            # Heads of multi-token prediction have it for their own labels.
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed_seq_params(with_padding=config.mtp_num_layers is not None),
            **step.model_arguments,
        )
    return output, partial(loss_func, step, num_live_layers(config))


def loss_func(
    step: PreparedBatch, live_layers: int, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the response tokens' negative log-probabilities, their number, and what is reported.

    live_layers: of multi-token prediction, which are given no routes.
    losses: [b, s]; each position's negative log-probability of the next token.
    """
    mask = step.batch.loss_mask
    total, count = (losses.float() * mask).sum(), mask.sum()
    # Tokens are of the rollout's distribution. In float64: with replay the differences are near float32's precision.
    divergence = k3(step.rollout_logprobs.double(), -losses.detach().double()[mask > 0]).sum().float()
    report = {"lm loss": torch.stack([total.detach(), count]), "k3 KL to rollout": torch.stack([divergence, count])}
    if live_layers and step.replay is not None:
        # Megatron reports such pairs as their ratio, over all ranks.
        report["r3 MTP layers live"] = torch.tensor([live_layers, 1.0], device=mask.device)
    return total, count.to(torch.int), {**report, **step.row_shares}


if __name__ == "__main__":
    after = "the same command goes on from the last checkpoint that --save has, if there is one"
    sys.exit(run_command("pretrain_r3", main, after))
