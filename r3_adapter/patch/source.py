"""`r3 patch VERB --source DIR`: the verbs on a git tree of an engine."""

import argparse
import sys
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch import checkout
from r3_adapter.patch.checkout import TreeOutcome, TreeState


def add_source(verb: argparse.ArgumentParser, name: str) -> None:
    """Add the options of a verb that are for git trees."""
    text = "git tree of an engine's source, in place of installed engines; each patch becomes a commit"
    verb.add_argument("--source", type=Path, metavar="DIR", help=text)
    if name == "apply":
        text = "with --source: interpreter that tries the imports and tests; default: this one"
        verb.add_argument("--python", type=Path, metavar="PYTHON", help=text)
        text = "with --source: do not run the unit tests that the patches bring"
        verb.add_argument("--skip-tests", action="store_true", help=text)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        PatchError: Names them.
    """
    if args.source and args.site:
        raise PatchError("--source and --site exclude each other: one is a git tree, the other a site-packages folder")
    for name in ("python", "skip_tests"):
        if getattr(args, name, None) and not args.source:
            raise PatchError(f"--{name.replace('_', '-')} goes with --source")


def run_source(name: str, args: argparse.Namespace) -> int:
    """Run a verb; return the exit code. A refusal may take several lines: one for each hunk that does not fit."""
    try:
        outcome = _outcome(name, args)
    except PatchError as error:
        text = "".join(each if each.isprintable() or each == "\n" else "?" for each in str(error))
        print(f"r3: {text}", file=sys.stderr)
        return 2
    print(f"{outcome.checkout}: {outcome.state}")
    for line in outcome.said:
        print(f"    {line}")
    return 1 if name == "verify" and outcome.state is not TreeState.APPLIED else 0


def _outcome(name: str, args: argparse.Namespace) -> TreeOutcome:
    tree = checkout.open_checkout(args.source, args.distributions)
    if name == "revert":
        return checkout.revert(tree)
    if name != "apply":
        return checkout.status(tree)
    from r3_adapter.patch.holds import check

    python = args.python or Path(sys.executable)
    return checkout.apply(tree, lambda made: check(made, python, tests=not args.skip_tests))
