"""The model of launch/pretrain_r3.py: megatron.training's own GPTModelBuilder, from its own arguments.

Source: pretrain_gpt.py@core_v0.19.2; megatron/training/argument_utils.py@0.19.2:gpt_config_from_args.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r3_adapter.megatron.layers import configured_moe_layers
from r3_adapter.megatron.policy_trainer.weights import load_weights


def model_config(args: Namespace) -> Any:
    """Return Megatron's GPTModelConfig as the arguments say, which builds the model chunks of each rank.

    With --r3-hf-checkpoint they begin with its weights.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    if args.transformer_impl == "local":
        use_local_attention()
    config = gpt_config_from_args(args)
    # The one argument of the model's that gpt_config_from_args leaves out.
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.r3_hf_checkpoint is not None:
        folder = args.r3_hf_checkpoint
        config.pre_wrap_hooks.append(lambda chunks: begin_with(chunks, folder))
    return config


def use_local_attention() -> None:
    """Let layers without TransformerEngine attend in packed rows and under context parallelism too.

    All layer specs ask this provider, those of multi-token prediction too.
    """
    from megatron.core.models.backends import LocalSpecProvider

    from r3_adapter.megatron.attention import LocalAttention

    LocalSpecProvider.core_attention = lambda self: LocalAttention


def begin_with(chunks: list[torch.nn.Module], folder: Path) -> list[torch.nn.Module]:
    """Give a rank's model chunks the weights of a Hugging Face checkpoint; return them.

    Layers of multi-token prediction, which the checkpoint's kind of model has not, keep their first weights.

    Raises:
        ReplayError: a weight of either that the other lacks, or that does not fit.
    """
    load_weights(chunks, folder, without=("mtp.",))
    return chunks


def embedding_ranks(pp_ranks: Sequence[int], config: Any) -> list[int]:
    """Return the ranks of a pipeline that have a copy of the word embeddings: both ends, and multi-token prediction's.

    config: Megatron's TransformerConfig.

    Source: pretrain_gpt.py@core_v0.19.2:get_embedding_ranks.
    """
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks

    return sorted({pp_ranks[0], pp_ranks[-1], *get_mtp_ranks(list(pp_ranks), config)})


def num_live_layers(config: Any) -> int:
    """Return the number of layers of multi-token prediction that have experts: no route is recorded for them.

    config: Megatron's TransformerConfig.
    """
    last = config.num_layers - 1
    return (config.mtp_num_layers or 0) if config.num_moe_experts and last in configured_moe_layers(config) else 0
