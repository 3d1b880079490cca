"""From the flags of `r3 balance` to what it says."""

import argparse

from r3_adapter.balance.budgets import compose_within
from r3_adapter.balance.compare import Balance, compare
from r3_adapter.balance.simulate import World, simulate
from r3_adapter.balance.steps import steps_of
from r3_adapter.errors import LayoutError, R3Error, counted
from r3_adapter.rollout import sample_folders


def balance(args: argparse.Namespace) -> Balance:
    """Do what the flags of `r3 balance` ask for.

    Raises:
        R3Error: neither traces nor a simulation, or both; traces that cannot be read; sizes that do not divide.
    """
    if bool(args.traces) == bool(args.simulate):
        raise R3Error("give folders of traces, or --simulate, and not both")
    if args.simulate:
        world = World(skew=args.simulate, drift=args.drift or 0.0)
        check_ranks(args.expert_model_parallel_size, world.num_experts)
        steps = simulate(world, args.steps or 2, args.seed)
    else:
        for name in ("steps", "drift"):
            if getattr(args, name) is not None:
                raise R3Error(f"--{name} needs --simulate; recorded traces have their own")
        steps = steps_of(sample_folders(args.traces))
        check_ranks(args.expert_model_parallel_size, steps[0][1].shape[2])
    return compare(steps, args.expert_model_parallel_size, args.max_tokens, num_groups=args.groups, seed=args.seed)


def within(found: Balance, limit: int, max_tokens: int, seed: int) -> str:
    """Say how the last step is composed within a limit of received tokens.

    Raises:
        LayoutError: it cannot be; names rank, layer and micro-batch.
    """
    shown = found.shown
    composed, budgets = compose_within(
        limit, shown.tokens, shown.counts, shown.placed, found.num_ranks, max_tokens, seed=seed
    )
    most = max(int(shown.tokens[step].sum()) for step in composed.steps())
    return (
        f"No rank receives more than {budgets.peak:,} tokens <= --max-received ({limit:,}) in "
        f"{counted(composed.num_steps, 'micro-step')} of at most {most:,} tokens, packed as before."
    )


def check_ranks(num_ranks: int, num_experts: int) -> None:
    """Refuse ranks that cannot share experts out.

    Raises:
        LayoutError: names both.
    """
    if num_experts % num_ranks:
        raise LayoutError(f"--ep ({num_ranks}) does not divide the {num_experts} experts of a layer")
