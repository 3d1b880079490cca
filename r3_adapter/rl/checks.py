"""What can be said of a run's flags before anything is started: the loop and `r3 plan` both ask here."""

import argparse
import math
from typing import Literal

from r3_adapter.arguments import layout_of
from r3_adapter.errors import LayoutError, R3Error, check_choice, check_whole
from r3_adapter.layout import ParallelLayout

Balance = Literal["off", "shuffle", "pack", "place"]
"""Samples by their lengths alone; in an order of chance; by the loads of their routes; and with experts placed."""

_COUNTS = (
    "rollout_num_engines",
    "rollout_tp_size",
    "rollout_pp_size",
    "rollout_batch_size",
    "n_samples_per_prompt",
    "rollout_max_prompt_len",
    "rollout_max_response_len",
    "micro_batch_size",
    "num_steps_per_rollout",
    "num_rollout",
    "save_interval",
)
_NUMBERS = ("lr", "min_lr", "clip_grad", "tis_clip", "eps_clip", "eps_clip_high", "kl_loss_coef", "gpus_per_rank")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or are out of their range; flags that a command lacks are not asked for.

    Raises:
        R3Error: names the flags and both operands.
    """
    for name in (*_COUNTS, "rollout_lag", "sft_steps"):
        least = 1 if name in _COUNTS else 0
        if (number := getattr(args, name, None)) is not None and number < least:
            raise R3Error(f"{_flag(name)} ({number}) < {least}")
    for name in _NUMBERS:
        number = getattr(args, name, None)
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise R3Error(f"{_flag(name)} ({number}) is not a finite number from 0 on")
    if args.rollout_temperature == 0:
        raise R3Error(
            f"--rollout-temperature ({args.rollout_temperature}): the samples of a prompt are all the same, so every "
            "advantage is 0 and nothing is learned"
        )
    _check_data(args)
    check_lag(args.rollout_lag, "r3" if args.r3 else "", args.r3_staleness)
    if hasattr(args, "r3_balance"):
        check_balance(
            args.r3_balance, layout_of(args), replay="r3" if args.r3 else "", placed=args.r3_placement is not None
        )
        check_max_received(args.r3_max_received, args.r3_balance, layout_of(args))
    for name in ("tp_size", "pp_size"):
        size = getattr(args, f"rollout_{name}")
        if (given := args.sglang_args.get(name, size)) != size:
            raise R3Error(f"--sglang-args {name} ({given!r}) != {_flag(f'rollout_{name}')} ({size})")
    num_micro_batches(
        args.rollout_batch_size * args.n_samples_per_prompt,
        layout_of(args),
        micro_batch_size=args.micro_batch_size,
        num_steps=args.num_steps_per_rollout,
    )


def _check_data(args: argparse.Namespace) -> None:
    data = getattr(args, "prompt_data", None)
    for name in ("hf_checkpoint", "custom_rm_path"):
        if data and not getattr(args, name):
            raise R3Error(f"--prompt-data ({data}) without {_flag(name)}")
    for name in ("custom_rm_path", "label_key", "apply_chat_template"):
        if not data and getattr(args, name, None):
            raise R3Error(f"{_flag(name)} ({getattr(args, name)}) without --prompt-data")


def check_lag(lag: int, replay: str, staleness: str) -> None:
    """Refuse rollouts that are ahead where rows of other weights are refused.

    Raises:
        R3Error: they are.
    """
    if lag and replay == "r3" and staleness == "refuse":
        raise R3Error(
            f"rollout lag ({lag}) > 0: such rollouts have rows of other weights, which staleness 'refuse' refuses; "
            "choose 'keep' or 'live' (--r3-staleness)"
        )


def check_balance(balance: str, layout: ParallelLayout, *, replay: str, placed: bool) -> None:
    """Refuse a balance that cannot hold. replay: as in PolicyOptions; placed: whether there is a placement.

    Raises:
        R3Error: names both operands.
    """
    check_choice("balance", balance, Balance)
    if placed != (balance == "place"):
        says = "is for --r3-balance place" if placed else "is missing"
        raise R3Error(f"--r3-balance {balance}: --r3-placement {says}; r3 balance TRACES --placement FILE makes one")
    if balance in ("off", "shuffle"):
        return
    if replay != "r3":
        raise R3Error(f"--r3-balance {balance} without --r3: loads are known where the rollout's routes are replayed")
    if layout.ep == 1:
        raise R3Error(f"--r3-balance {balance} with expert-model-parallel-size 1: one rank has all experts")
    parts_of_group(layout)


def check_max_received(limit: int | None, balance: str, layout: ParallelLayout) -> None:
    """Refuse a limit of received tokens where they are not known before the step.

    Raises:
        R3Error: names both operands.
    """
    if limit is None:
        return
    check_whole("max_received", limit, 1)
    if balance not in ("pack", "place"):
        raise R3Error(f"--r3-max-received {limit} with --r3-balance {balance}: loads are counted for pack and place")
    if layout.expert_size % (layout.tp * layout.cp):
        raise R3Error(
            f"--r3-max-received {limit}: expert groups of etp * ep ({layout.expert_size}) ranks have a part of each "
            f"micro-batch of tp * cp ({layout.tp * layout.cp}) ranks only"
        )


def parts_of_group(layout: ParallelLayout) -> int:
    """Return the number of data-parallel ranks whose micro-batches go through one copy of the experts.

    Raises:
        LayoutError: expert groups and data-parallel ranks that lie across each other.
    """
    dense, expert = layout.tp * layout.cp, layout.expert_size
    if expert % dense and dense % expert:
        raise LayoutError(
            f"expert groups of etp * ep ({expert}) ranks lie across data-parallel ranks of tp * cp ({dense}): "
            "their micro-batches cannot be composed by groups"
        )
    return max(1, expert // dense)


def num_micro_batches(num_samples: int, layout: ParallelLayout, *, micro_batch_size: int, num_steps: int) -> int:
    """Return the micro-batches of each data-parallel rank in a step.

    num_samples: of all ranks. micro_batch_size: samples in a micro-batch, on average at most.
    num_steps: optimizer steps, over which a rank's micro-batches are shared out evenly.

    Raises:
        LayoutError: fewer samples than micro-batches.
    """
    multiple = num_steps * (layout.pp if layout.vpp > 1 else 1)
    wanted = -(-num_samples // (layout.dp * micro_batch_size))
    per_rank = -(-wanted // multiple) * multiple
    if num_samples < layout.dp * per_rank:
        raise LayoutError(
            f"{num_samples} samples of a step < {layout.dp * per_rank} micro-batches (dp {layout.dp} x {per_rank}, "
            f"a multiple of {num_steps} optimizer steps{f' x pp {layout.pp}' if layout.vpp > 1 else ''})"
        )
    return per_rank


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
