"""`r3 plan`: what a layout takes, without a GPU."""

import argparse
import json
import sys

from r3_adapter import arguments
from r3_adapter.errors import LayoutError, R3Error
from r3_adapter.parsers import Subparsers

EXAMPLES = (
    "r3 plan --model-config config.json --tp 4 --ep 8 --r3",
    "r3 plan --model-config config.json --pp 4 --ep 8 --use-distributed-optimizer --skew medium --json plan.json",
)


def add_plan(subparsers: Subparsers) -> None:
    """Add `r3 plan`."""
    text = "check a layout for a model, and compute memory and traffic of routes, weights and buffers; needs no GPU"
    parser = subparsers.add_parser("plan", help=text, description=text, examples=EXAMPLES)
    arguments.add_plan_arguments(parser)
    arguments.add_r3_arguments(parser)
    arguments.add_layout_arguments(parser)
    arguments.add_rl_arguments(parser)
    arguments.add_run_arguments(parser)
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    from r3_adapter.plan.command import plan_of
    from r3_adapter.plan.tables import print_plan
    from r3_adapter.rl.checks import check_flags

    try:
        plan = plan_of(args)
    except LayoutError as error:
        print(f"r3 plan: does not fit: {error}", file=sys.stderr)
        return 1
    print_plan(plan, Console(width=None if sys.stdout.isatty() else 120))
    if args.json:
        args.json.write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")
    try:
        check_flags(args)
    except R3Error as error:
        print(f"r3 plan: does not fit: {error}", file=sys.stderr)
        return 1
    return 0 if plan.passed else 1
