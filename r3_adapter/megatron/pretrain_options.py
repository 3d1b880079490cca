"""Arguments of megatron.training that launch/pretrain_r3.py would not follow: each is refused by name.

Arguments that Megatron's model builder and its loop read have their effect. The others are for another model, another
loop or another data set, and would be ignored silently. Read in megatron.training 0.19.2.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r3_adapter.errors import R3Error
from r3_adapter.megatron.config_fields import refused_options

_DATA = "samples are those of --r3-traces"
_NO_BUILDER = "Megatron's builder of GPT models does not look at it"
_LOOP = "it is read by a loop that makes its own batches"

_GROUPS: Mapping[str, str] = {
    "biencoder": "it is of a retriever's training script",
    "vision": "it is of a training script for pictures",
    "rl": "it is of train_rl.py, which makes rollouts; this script trains on recorded ones",
    "sft": "its samples are conversations of --data-path; --dataloader-inter-document-masking packs samples",
    "data and dataloader": _DATA,
}
"""Groups of arguments by title: all are refused but those of FOLLOWED."""

_FOLLOWED = """
    seq_length encoder_seq_length num_workers dataloader_inter_document_masking create_attention_mask_in_dataloader
"""

FOLLOWED = frozenset(_FOLLOWED.split())
"""Arguments of these groups that are followed. No attention mask is made of any: attention is causal, by sample."""

_NAMES: Mapping[str, str] = {
    # Models.
    "decoder_num_layers": f"{_NO_BUILDER}; --num-layers",
    "relative_attention_num_buckets": _NO_BUILDER,
    "relative_attention_max_distance": _NO_BUILDER,
    "add_position_embedding": f"{_NO_BUILDER}; --position-embedding-type",
    "openai_gelu": _NO_BUILDER,
    "onnx_safe": _NO_BUILDER,
    "bert_binary_head": _NO_BUILDER,
    "use_flash_attn": f"{_NO_BUILDER}; --attention-backend flash",
    "hybrid_layer_pattern": "this loop builds a GPTModel",
    "hybrid_override_pattern": "this loop builds a GPTModel",
    "is_hybrid_model": "this loop builds a GPTModel",
    "heterogeneous_layers_config_path": f"{_NO_BUILDER} where layers have experts",
    "heterogeneous_layers_config_encoded_json": f"{_NO_BUILDER} where layers have experts",
    "moe_use_upcycling": "it wants a function that builds a dense model first",
    "moe_upcycling_granularity": "it is of --moe-use-upcycling, which is refused",
    "init_model_with_meta_device": "such a model has no place for --r3-hf-checkpoint's weights",
    # The loop.
    "yaml_cfg": "its file replaces all arguments, this script's too",
    "logits_load_dir": "the loss is the negative log-probability of the sampled tokens, without a teacher's",
    "overlap_moe_expert_parallel_comm": "its schedule plan scores labels later, without the rollout's temperatures",
    "iterations_to_skip": _LOOP,
    "full_validation": _LOOP,
    "multiple_validation_sets": _LOOP,
    "validation_set_names": _LOOP,
}


def check_given(arguments: Sequence[str], add_own: Any) -> None:
    """Refuse arguments that the script would not follow; others are Megatron's own parser's to refuse.

    arguments: of the command line. add_own: adds the script's arguments to a parser.

    Raises:
        R3Error: Names the argument.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = add_own(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    given, _ = parser.parse_known_args(arguments)
    for flag, value, why in refused_arguments(parser, given):
        raise R3Error(f"{flag} ({value!r}): {why}")


def refused_arguments(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Iterator[tuple[str, Any, str]]:
    """Yield each argument that is refused: its flag, its value, and why. parser: that has Megatron's arguments."""
    for group in parser._action_groups:
        for action in group._group_actions:
            why = _NAMES.get(action.dest, "" if action.dest in FOLLOWED else _GROUPS.get(group.title or "", ""))
            if why and action.dest in given and getattr(given, action.dest) != action.default:
                yield action.option_strings[0], getattr(given, action.dest), why


def check_arguments(args: argparse.Namespace, config: Any) -> None:
    """Refuse what arguments ask together that this script, or replay, does not follow.

    args: as Megatron has checked them; config: Megatron's TransformerConfig that it made of them.

    Raises:
        R3Error: Names the argument.
    """
    if args.r2:
        raise R3Error(
            "--r2 replays the trainer's own pass for old log-probabilities, and this loop makes none: use --r3"
        )
    if args.dataloader_type != "external":
        raise R3Error(f"--dataloader-type {args.dataloader_type} != external: the samples come in batches already")
    if args.dataloader_inter_document_masking:
        for name in ("micro_batch_size", "eval_micro_batch_size"):
            if (size := getattr(args, name)) != 1:
                raise R3Error(
                    f"--{name.replace('_', '-')} {size} != 1 with --dataloader-inter-document-masking: a micro-batch "
                    "is one sequence of --seq-length tokens, and holds as many samples as fit"
                )
    if args.r3:
        for name, found, wanted, why in refused_options(vars(config)):
            raise R3Error(f"{name} ({found!r}) != {wanted}: {why}")
