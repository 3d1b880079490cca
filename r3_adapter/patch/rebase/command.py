"""`r3 patch rebase`: what a maintainer, or a scheduler, runs when a release is new."""

import argparse
import sys
import tempfile
from datetime import date
from itertools import groupby
from pathlib import Path

from r3_adapter.patch.git import Repo
from r3_adapter.patch.rebase.export import write_series
from r3_adapter.patch.rebase.rebase import Outcome, Request, keep_tree, rebase
from r3_adapter.patch.rebase.table import Row, add_pins, write_rows
from r3_adapter.patch.series import Contents, listed, patches_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `r3 patch rebase`."""
    parser.add_argument("distribution", metavar="DISTRIBUTION", help="sglang or megatron-core")
    parser.add_argument(
        "version", metavar="VERSION", help="version to bring the series to, or `newest` of the registry"
    )
    text = "version whose series is taken; default: the nearest"
    parser.add_argument("--from", dest="origin", metavar="VERSION", help=text)
    text = "wheel of the version; default: the registry's"
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=text)
    text = "git tree whose HEAD is the version, for one that no registry has"
    parser.add_argument("--source", type=Path, metavar="DIR", help=text)
    text = "wheel of the version that the series is for; default: the registry's"
    parser.add_argument("--from-wheel", type=Path, metavar="FILE", help=text)
    text = "folder of the git tree with the patches as commits; one in which conflicts were mended is taken as it is"
    parser.add_argument("--tree", type=Path, metavar="DIR", help=text)
    text = "interpreter of an environment with the version: run the series' unit tests there"
    parser.add_argument("--python", type=Path, metavar="FILE", help=text)
    text = "write the series although breaks were found, with the reason in the table of versions"
    parser.add_argument("--accept", metavar="REASON", help=text)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="report the state, and write nothing")
    text = "write the row in the table of versions, and nothing else"
    only.add_argument("--row", action="store_true", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 if the series holds on the release, else 1."""
    root = patches_root()
    request = Request(
        args.distribution,
        args.version,
        origin=args.origin,
        wheel=args.wheel,
        source=args.source,
        origin_wheel=args.from_wheel,
        tree=args.tree,
        python=args.python,
        root=root,
    )
    with tempfile.TemporaryDirectory(prefix="r3-patch-") as work:
        outcome, repo, released = rebase(request, Path(work), _tell)
        _say(outcome)
        row = _row(outcome, args.accept)
        print(row)
        if args.row:
            write_rows(root / "README.md", row)
        elif not args.check:
            _finish(args, outcome, repo, released, root)
    return 0 if outcome.clean or (args.accept and outcome.breaks and not outcome.stopped and outcome.passed) else 1


def _tell(step: str) -> None:
    print(f"r3: {step}", file=sys.stderr, flush=True)


def _say(outcome: Outcome) -> None:
    """Print what was found."""
    for patch, conflicts in groupby(outcome.conflicts, lambda conflict: conflict.patch):
        told = list(conflicts)
        print(f"conflicts of {patch}\n    {told[0].reason}")
        for conflict in told:
            print(f"    {conflict}")
    for finding, patch in outcome.findings:
        of = f"\n    {patch}" if patch else ""
        print(f"{'break' if finding.breaks else 'to read'}: {finding}{of}")
    if outcome.stopped:
        print("breaks were looked for in the hunks that fit alone")
    elif outcome.tests is None:
        print("the series' unit tests were not run: give an environment with this release, --python FILE")
    else:
        print(f"the series' unit tests: {outcome.tests}")


def _row(outcome: Outcome, accepted: str | None) -> Row:
    state = outcome.state + (f"; accepted: {accepted}" if accepted and outcome.breaks else "")
    tests = "not run" if outcome.tests is None else outcome.tests
    return Row(
        outcome.distribution, outcome.version, state.replace("|", "/"), tests.replace("|", "/"), str(date.today())
    )


def _finish(args: argparse.Namespace, outcome: Outcome, repo: Repo, released: Contents, root: Path) -> None:
    """Write the series, or leave the tree and say how to go on."""
    again = f"r3 patch rebase {outcome.distribution} {outcome.version} --from {outcome.origin.version}"
    if outcome.stopped or not (outcome.clean or (args.accept and outcome.passed)):
        place = args.tree or keep_tree(repo, Path(f"{outcome.distribution}-{outcome.version}.tree").absolute())
        steps = []
        if outcome.stopped:
            steps += ["mend the files that `git status` names, `git add` them", "git cherry-pick --continue"]
            steps += ["and so on until no patch is left"]
        else:
            steps += ["mend each break in its patch: git commit --fixup COMMIT, git rebase --autosquash r3-released"]
        print("\n".join([f"the tree is {place}; there:", *(f"    {step}" for step in steps)]))
        print(f"then: {again} --tree {place}")
        return
    series = write_series(repo, outcome.origin, outcome.version, released)
    missing = add_pins(root / "README.md", series.distribution, series.version, [path.name for path in listed(series)])
    outcome.pinned = True
    write_rows(root / "README.md", _row(outcome, args.accept))
    print(f"wrote {series.folder}, {len(series.files)} files locked")
    for name in missing:
        print(f"the table of patches in README.md has no row for {name}; write one")
