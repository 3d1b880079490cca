"""The `r3` command.

Exit codes: 0 done; 1 a check said no (`patch verify`, `prove`, `plan`, `doctor`); 2 refused or used wrongly, with the
reason on stderr.
"""

import sys
from collections.abc import Callable, Sequence

from r3_adapter.commands.balance import add_balance
from r3_adapter.commands.bench import add_bench
from r3_adapter.commands.doctor import add_doctor
from r3_adapter.commands.patch import add_patch
from r3_adapter.commands.plan import add_plan
from r3_adapter.commands.prove import add_prove
from r3_adapter.commands.report import add_report
from r3_adapter.commands.version import Version
from r3_adapter.parsers import OneCommandParser, Subparsers
from r3_adapter.signals import AFTER, run_command

COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    add_patch,
    add_prove,
    add_plan,
    add_bench,
    add_report,
    add_balance,
    add_doctor,
)


def make_parser() -> OneCommandParser:
    """Return the parser of all commands."""
    parser = OneCommandParser(
        prog="r3",
        description="Rollout Routing Replay between SGLang and Megatron-core.",
        epilog="`r3 COMMAND --help` has the flags of a command, with examples.",
    )
    text = "show the version of this package, the engines that are installed, and whether they are patched"
    parser.add_argument("--version", action=Version, nargs=0, help=text)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in COMMANDS:
        add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    args = make_parser().parse_args(argv)
    return run_command("r3", lambda: args.run(args), getattr(args, "after", AFTER))


if __name__ == "__main__":
    sys.exit(main())
