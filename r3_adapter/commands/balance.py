"""`r3 balance`: how even the loads of expert-parallel ranks are."""

import argparse
import json
import sys
from pathlib import Path

from r3_adapter.arguments import SKEWS, add_json_argument, add_seed_argument, add_size
from r3_adapter.flag_values import output_file, whole
from r3_adapter.parsers import Subparsers

EXAMPLES = (
    "r3 balance rollouts/ --ep 8 --page balance.html",
    "r3 balance --simulate strong --ep 8",
    "r3 balance rollouts/ --ep 8 --placement experts.safetensors",
)


def add_balance(subparsers: Subparsers) -> None:
    """Add `r3 balance`."""
    text = "how even the loads of expert-parallel ranks are, and what placing experts and packing samples would give"
    parser = subparsers.add_parser("balance", help=text, description=text, examples=EXAMPLES)
    text = "folders of samples with their routes, which --save-rollouts wrote"
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACES", help=text)
    group = parser.add_argument_group("trainer")
    add_size(group, "ep", required=True, default=None)
    text = "most tokens of a micro-step, of all these ranks together"
    group.add_argument("--max-tokens", type=whole(1), default=32768, metavar="N", help=text)
    text = "groups of experts, for a router that is limited to some of them"
    group.add_argument("--groups", type=whole(1), default=1, metavar="N", help=text)
    text = "compose the last step so that no rank receives more than N tokens in a layer, or say that it cannot be"
    group.add_argument("--max-received", type=whole(1), metavar="N", help=text)
    group = parser.add_argument_group("simulation", "in place of TRACES")
    group.add_argument("--simulate", metavar="SKEW", help=f"how uneven the simulated routes are: {', '.join(SKEWS)}")
    group.add_argument("--steps", type=whole(1, 64), metavar="N", help="steps to simulate; default: 2")
    text = "how much each step changes each expert's popularity, such as 0.02; default: 0"
    group.add_argument("--drift", type=float, metavar="X", help=text)
    add_seed_argument(group, "seed of the simulation and of random orders")
    group = parser.add_argument_group("output")
    add_json_argument(group)
    text = "write the placement by the loads of the last step, for --r3-placement"
    group.add_argument("--placement", type=output_file, metavar="FILE", help=text)
    text = "write an HTML page: loads by layer and expert, and of the ranks before and after"
    group.add_argument("--page", type=output_file, metavar="FILE", help=text)
    parser.set_defaults(run=_balance)


def _balance(args: argparse.Namespace) -> int:
    from rich.console import Console

    from r3_adapter.balance.command import balance, within
    from r3_adapter.balance.steps import table_of
    from r3_adapter.balance.tables import drift_line, tables_of
    from r3_adapter.rollout import sample_folders

    found = balance(args)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables_of(found):
        console.print(table)
    console.print(drift_line(found), highlight=False)
    if args.max_received:
        console.print(within(found, args.max_received, args.max_tokens, args.seed), highlight=False)
    if args.json:
        args.json.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    if args.page:
        from r3_adapter.balance.page import write_page

        source = f"simulated, {args.simulate} skew" if args.simulate else ", ".join(map(str, args.traces))
        write_page(args.page, found, source)
    if args.placement:
        table_of(found.shown.newest, sample_folders(args.traces)).save(args.placement)
    return 0
