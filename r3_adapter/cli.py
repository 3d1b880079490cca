"""The `r3` command.

Exit codes: 0 done; 1 a check said no (`verify`); 2 refused or used wrongly, with the reason on stderr.

A subcommand is a function that adds its parser and sets `run`; list it in COMMANDS. Import engines and torch inside
`run` only: `r3 patch` has to work before they can be imported.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r3_adapter import patching
from r3_adapter.errors import R3Error
from r3_adapter.patching import Outcome, State

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="r3", description="Rollout Routing Replay between SGLang and Megatron-core.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(subparsers)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except R3Error as error:
        print(f"r3: {error}", file=sys.stderr)
        return 2
    return code


def add_patch(subparsers: "Subparsers") -> None:
    """Add `r3 patch`."""
    parser = subparsers.add_parser("patch", help="patch the installed engines, or take the patches back")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("apply", _apply, "patch all or nothing; does nothing where it is done already"),
        ("revert", _revert, "restore the released files byte for byte"),
        ("status", _status, "show what is installed, what is pinned and how they stand"),
        ("verify", _verify, "exit 0 only if every distribution is patched exactly"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("distributions", nargs="*", metavar="DISTRIBUTION", help="default: all installed ones")
        _add_site(verb)
        verb.set_defaults(run=run)
    text = "for maintainers: recompute the hashes of a series from a released installation"
    verb = verbs.add_parser("lock", help=text, description=text)
    verb.add_argument("distribution", metavar="DISTRIBUTION")
    verb.add_argument("version", metavar="VERSION")
    _add_site(verb)
    verb.set_defaults(run=_lock)


COMMANDS: tuple[Callable[["Subparsers"], None], ...] = (add_patch,)


def _add_site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", type=Path, metavar="DIR", help="site-packages folder (default: this interpreter's)")


def _apply(args: argparse.Namespace) -> int:
    _report(patching.apply(args.distributions, site=args.site), "applied")
    return 0


def _revert(args: argparse.Namespace) -> int:
    _report(patching.revert(args.distributions, site=args.site), "reverted")
    return 0


def _report(outcomes: Sequence[Outcome], done: str) -> None:
    for outcome in outcomes:
        did = f"{done}, {len(outcome.changed)} files changed" if outcome.changed else f"already {done}, nothing to do"
        print(f"{outcome.distribution} {outcome.version}: {did}")


def _status(args: argparse.Namespace) -> int:
    for found in patching.status(args.distributions, site=args.site):
        installed, pinned = found.installed or "-", ", ".join(found.pinned) or "-"
        print(f"{found.distribution}: {found.state} (installed: {installed}; pinned: {pinned})")
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = patching.status(args.distributions, site=args.site)
    missing = State.NOT_INSTALLED
    checked = found if args.distributions else [status for status in found if status.state is not missing] or found
    for status in checked:
        print(patching.explain(status))
    return 0 if checked and all(status.state is State.APPLIED for status in checked) else 1


def _lock(args: argparse.Namespace) -> int:
    series = patching.lock(args.distribution, args.version, site=args.site)
    print(f"{series.distribution} {series.version}: locked {len(series.files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
