"""`r3 patch`: patch the engines, or take the patches back."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.parsers import Subparsers
from r3_adapter.patch import packages, source
from r3_adapter.patch.packages import Outcome, State
from r3_adapter.patch.rebase.command import add_arguments

EXAMPLES = {
    "apply": ("r3 patch apply", "r3 patch apply sglang", "r3 patch apply --source ~/Megatron-LM --skip-tests"),
    "revert": ("r3 patch revert", "r3 patch revert --source ~/Megatron-LM"),
    "status": ("r3 patch status", "r3 patch status --source ~/sglang"),
    "verify": ("r3 patch verify", "r3 patch verify sglang --site /opt/venv/lib/python3.12/site-packages"),
    "lock": ("r3 patch lock sglang 0.5.23",),
    "rebase": ("r3 patch rebase sglang newest --check", "r3 patch rebase megatron-core 0.19.2 --from 0.19.1"),
}


def add_patch(subparsers: Subparsers) -> None:
    """Add `r3 patch`."""
    text = "patch the engines, or take the patches back"
    parser = subparsers.add_parser("patch", help=text, description=text)
    parser.set_defaults(after="`r3 patch status` says how everything stands")
    verbs = parser.add_subparsers(required=True, metavar="VERB", title="verbs")
    for name, run, text in (
        ("apply", _apply, "apply all patches or none; does nothing if they are applied already"),
        ("revert", _revert, "restore the released files byte for byte"),
        ("status", _status, "show which versions are installed, which are pinned, and whether patches are applied"),
        ("verify", _verify, "exit 0 only if every distribution is patched exactly"),
    ):
        verb = verbs.add_parser(name, help=text, description=text, examples=EXAMPLES[name])
        what = "sglang or megatron-core; default: all that are installed"
        verb.add_argument("distributions", nargs="*", metavar="DISTRIBUTION", help=what)
        _add_site(verb)
        source.add_source(verb, name)
        verb.set_defaults(run=_installed_or_source(name, run))
    text = "for maintainers: recompute the hashes of a series from a released installation"
    verb = verbs.add_parser("lock", help=text, description=text, examples=EXAMPLES["lock"])
    verb.add_argument("distribution", metavar="DISTRIBUTION", help="sglang or megatron-core")
    verb.add_argument("version", metavar="VERSION", help="the release, which must be installed and not patched")
    _add_site(verb)
    verb.set_defaults(run=_lock)
    text = "for maintainers: bring a series to another release, and say what conflicts or breaks"
    verb = verbs.add_parser("rebase", help=text, description=text, examples=EXAMPLES["rebase"])
    add_arguments(verb)


def _add_site(parser: argparse.ArgumentParser) -> None:
    text = "site-packages folder to look in; default: this interpreter's"
    parser.add_argument("--site", type=Path, metavar="DIR", help=text)


def _installed_or_source(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Return what runs a verb of `r3 patch` on the installed engines, or on the git tree that --source names."""

    def either(args: argparse.Namespace) -> int:
        source.check_options(args)
        return source.run_source(name, args) if args.source else run(args)

    return either


def _apply(args: argparse.Namespace) -> int:
    return _report(*packages.each(packages.apply, args.distributions, site=args.site), "applied")


def _revert(args: argparse.Namespace) -> int:
    return _report(*packages.each(packages.revert, args.distributions, site=args.site), "reverted")


def _report(outcomes: Sequence[Outcome], refusals: Sequence[PatchError], done: str) -> int:
    for outcome in outcomes:
        did = f"{done}, {len(outcome.changed)} files changed" if outcome.changed else f"already {done}, nothing to do"
        print(f"{outcome.distribution} {outcome.version}".rstrip() + f": {did}")
    for refusal in refusals:
        print(f"r3: {refusal}", file=sys.stderr)
    return 2 if refusals else 0


def _status(args: argparse.Namespace) -> int:
    for found in packages.status(args.distributions, site=args.site):
        installed, pinned = found.installed or "-", ", ".join(found.pinned) or "-"
        said = f"{found.distribution}: {found.state} (installed: {installed}; pinned: {pinned})"
        todo = found.reason or packages.advice(found)
        print(f"{said}: {todo}" if todo else said)
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = packages.status(args.distributions, site=args.site)
    missing = State.NOT_INSTALLED
    checked = found if args.distributions else [status for status in found if status.state is not missing] or found
    for status in checked:
        print(packages.explain(status))
    return 0 if checked and all(status.state is State.APPLIED for status in checked) else 1


def _lock(args: argparse.Namespace) -> int:
    series = packages.lock(args.distribution, args.version, site=args.site)
    print(f"{series.distribution} {series.version}: locked {len(series.files)} files")
    return 0
