"""What can be said of a run's flags before anything is started: the loop and `r3 plan` both ask here."""

import argparse
import math

from r3_adapter.arguments import layout_of
from r3_adapter.errors import LayoutError, R3Error
from r3_adapter.layout import ParallelLayout

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
_NUMBERS = ("lr", "clip_grad", "tis_clip", "eps_clip", "eps_clip_high", "kl_loss_coef", "gpus_per_rank")


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
    check_lag(args.rollout_lag, "r3" if args.r3 else "", args.r3_staleness)
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
